"""A corpus file -> a filtered corpus, in parts that survive a crash.

options.py    what a run was asked to do
folder.py     the run's folder: one owner at a time, files that appear whole or not at all
identity.py   what decides a run's scores, as hashes; two runs that differ in it never share a folder
parts.py      the scores of a fixed range of rows, in one Parquet file
engine.py     rows -> scores, in this process
cutting.py    scores -> threshold -> kept, dropped and unscored rows
run.py        the order of these steps, and where a second start goes on
summary.py    what a finished folder says to a person
"""
