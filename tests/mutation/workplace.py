"""A copy of the repository in which one file at a time is broken, compiled and tested."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1800
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def _aside(word: str) -> str:
    return word.removesuffix(".o") + ".changed.o"


class Workplace:
    """The copy: what git tracks or would add, and the CPU extension once `build` has made it.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compile_commands: dict[str, list[str]] = {}
        self.included: dict[str, set[str]] = {}
        self.link_command: list[str] = []
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def run(self, command: list[str], *, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy.

        Args:
            command: what to run.
            interpreted: under Triton's interpreter.

        Returns:
            What it printed, and how it ended; 124 where it had not after `SECONDS`.
        """
        # the CUDA extension runs on GPUs alone, and takes minutes to compile
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "GRADSHIELD_CUDA": "0"}
        if interpreted:
            environment["TRITON_INTERPRET"] = "1"
        try:
            return subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", f"no end after {SECONDS} s")

    def tests(self, names: tuple[str, ...], *, interpreted: bool) -> subprocess.CompletedProcess[str]:
        """Run tests, to the first failure.

        Args:
            names: files or node ids.
            interpreted: under Triton's interpreter.

        Returns:
            What pytest printed.
        """
        # no limit on a test's time but `SECONDS` for all: a machine that is busy elsewhere must not look like a catch
        quiet = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=mutation", "--timeout=0"]
        return self.run([sys.executable, "-m", "pytest", *quiet, *names], interpreted=interpreted)

    def build(self) -> str:
        """Build the CPU extension whole, and note which commands did it and what each source includes.

        Returns:
            "" or the compiler's last words.
        """
        done = self.run([sys.executable, "setup.py", "build_ext", "--inplace", "--force"])
        if done.returncode != 0 or not list((self.folder / "gradshield_fast").glob("_native*.so")):
            return done.stderr[-300:]
        for words in map(shlex.split, done.stdout.splitlines()):
            if "-shared" in words:
                self.link_command = words
            elif "-c" in words and (source := words[words.index("-c") + 1]).startswith("csrc/"):
                self.compile_commands[source] = words
                at = words.index("-o")
                rule = self.run(["-MM" if word == "-c" else word for word in words[:at] + words[at + 2 :]])
                self.included[source] = set(rule.stdout.replace("\\\n", " ").split()[1:])
        return "" if self.link_command else "the build did not say how it linked"

    def rebuild(self, file: str) -> str:
        """Link the extension again, with what includes a changed file compiled anew beside the objects of `build`.

        Args:
            file: path in the repository.

        Returns:
            "" or the compiler's last words.
        """
        changed = [source for source, files in self.included.items() if file in files]
        if not changed:
            return f"no source includes {file}"

        def compiled(source: str) -> subprocess.CompletedProcess[str]:
            return self.run([_aside(word) if word.endswith(".o") else word for word in self.compile_commands[source]])

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as workers:
            for done in workers.map(compiled, changed):
                if done.returncode != 0:
                    return done.stderr[-300:]
        anew = {word for source in changed for word in self.compile_commands[source] if word.endswith(".o")}
        done = self.run([_aside(word) if word in anew else word for word in self.link_command])
        built = self.folder / self.link_command[self.link_command.index("-o") + 1]
        if done.returncode == 0:
            shutil.copy2(built, self.folder / "gradshield_fast" / built.name)
        return "" if done.returncode == 0 else done.stderr[-300:]

    def has(self, isa: str) -> bool:
        """Say whether the copy's extension runs an instruction set here.

        Args:
            isa: one of `ISAS`, or "" for none in particular.

        Returns:
            Whether it does.
        """
        return not isa or (self._isa in ISAS and ISAS.index(self._isa) >= ISAS.index(isa))

    @cached_property
    def _isa(self) -> str:
        code = "from gradshield_fast.ops import native; print(native.isa())"
        return self.run([sys.executable, "-c", code]).stdout.strip()
