"""A corpus file -> a filtered corpus, in parts that survive a crash.

options.py         what a run was asked to do
folder.py          the run's folder: who may write in it, files that appear whole or not at all
identity.py        what decides a run's scores, as hashes; two runs that differ in it never share a folder
manifest.py        identity and units, written once
units.py           ranges of rows: cut, read from where they begin, dealt to shards
duplicate_rows.py  rows that say the same, found before anything is scored
encoding.py        units -> tokens, ahead of the scorer
engine.py          tokens -> scores
worker.py          a model, a direction and a scorer: units -> parts; all agree on what the first one wrote
ray_engine.py      workers on the machines of a Ray cluster
parts.py           the scores of a unit, in one Parquet file
duplicates.py      the scores of rows that repeat others
cutting.py         scores -> threshold -> kept, dropped and unscored rows
run.py             the order of these steps, and where a second start goes on
sessions.py        what each start did, unit by unit
record.py          run.json: the sum of all of that
status.py          how far a run is
planning.py        what a run will need, from a sample of its rows
measuring.py       a step's memory and the rate on this machine
summary.py         what a finished folder says to a person
"""
