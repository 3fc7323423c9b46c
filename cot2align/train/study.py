"""The command `run`: a whole study from one recipe, to one table.

`recipe.py` plans it as stages. `stages/` in the study's folder holds each stage's settings, as a
YAML file that its command takes, and a record of what it was made from: its settings, the stages
before it and the contents of the files it reads. A stage whose record is the same is not run again,
one that was interrupted goes on where it was, and one that has changed is run anew, with the old
folder moved to `replaced/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import yaml

from cot2align.train.__main__ import TRAININGS, handled, interrupt_ends_process, run_module
from cot2align.train.config import (
    CheckConfig,
    RecipeCheck,
    RecipeConfig,
    RecipeList,
    UserError,
    build,
    counted,
    nearest,
    to_yaml,
)
from cot2align.train.files import write_whole
from cot2align.train.recipe import Plan, Stage, make_plan
from cot2align.train.worker import DONE, free_memory

RECIPE_FILE = "recipe.yaml"
RESUMABLE = (*TRAININGS, "augment", "evaluate", "judge")


def run(config: RecipeConfig | RecipeList) -> dict[str, Any]:
    """Run what is not finished, then write the report; returns `report.collect`'s results.

    Of a list all recipes are checked before the first one starts, and the results are by output
    folder. Raises UserError.
    """
    with interrupt_ends_process():
        from cot2align.train import report

    if isinstance(config, RecipeList):
        for each in config.recipes:
            _check_folder(make_plan(each).folder)
        return {each.output: run(each) for each in config.recipes}
    plan = make_plan(config)
    with _locked(plan.folder) as lock, _terminated_like_interrupted():
        write_whole(plan.folder / RECIPE_FILE, to_yaml(config))
        _Runner(plan, config, lock).run()
        return report.write(plan)


def _check_folder(folder: Path) -> None:
    """Raises UserError for one that is neither new nor empty nor a study already."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file, expected a folder")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if there - {"stages", f"{RECIPE_FILE}.partial"} and RECIPE_FILE not in there:
        raise UserError(f"output folder {folder} is not empty and holds no study; choose another")


def _terminated_like_interrupted() -> contextlib.AbstractContextManager[None]:
    """SIGTERM leaves through the same door as Ctrl-C, which takes the children along."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    return handled(signal.SIGTERM, leave)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The study's folder for this process and its children alone; the lock's file descriptor, which
    they inherit."""
    import fcntl

    _check_folder(folder)
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    with (folder / "stages" / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is at work on {folder}") from None
        yield lock.fileno()


class _Keys:
    """What stages are made from, as a hash each: settings, inputs, and the stages before them."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.by_stage: dict[str, str] = {}
        self.hashes: dict[str, str] = {}

    def add(self, stage: Stage, settings: dict[str, Any]) -> str:
        """Keep and return the key of a stage; those that it needs have theirs already."""
        kept = counted(stage.config(settings))
        lists = (value if isinstance(value, list) else [value] for value in kept.values())
        values = {value for some in lists for value in some if isinstance(value, str)}
        made = {
            "command": stage.command,
            "settings": {name: self._inside(value) for name, value in kept.items()},
            "needs": [self.by_stage[name] for name in stage.needs],
            "files": {v: self._hash(v) for v in sorted(values) if self._is_outside(v)},
        }
        key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
        self.by_stage[stage.name] = key
        return key

    def is_finished(self, stage: Stage) -> bool:
        record = read_record(self.plan.folder, stage)
        is_there = Path(stage.settings["output"]).exists()
        return record.get("key") == self.by_stage[stage.name] and "seconds" in record and is_there

    def _inside(self, value: Any) -> Any:
        """A path in the study's folder, from there: the folder may be moved."""
        folder = self.plan.folder
        is_ours = isinstance(value, str) and folder in Path(value).parents
        return str(Path(value).relative_to(folder)) if is_ours else value

    def _is_outside(self, value: str) -> bool:
        path = Path(value)
        inside = self.plan.folder.resolve() in path.resolve().parents
        return path.exists() and not inside

    def _hash(self, value: str) -> str:
        if value not in self.hashes:
            self.hashes[value] = _content_hash(Path(value))
        return self.hashes[value]


LARGE = 1 << 26  # bytes; of larger files the size and the time stand for the content


def _content_hash(path: Path) -> str:
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        state = file.stat()
        total.update(str(file.relative_to(path)).encode() + b"\0")
        if state.st_size > LARGE:
            total.update(f"{state.st_size} {state.st_mtime_ns}".encode())
        else:
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


class _Runner:
    """Runs a plan's stages: one after the other in this process, several at a time in workers, or
    trainings by a launcher."""

    def __init__(self, plan: Plan, config: RecipeConfig, lock: int):
        self.plan = plan
        self.config = config
        self.lock = lock
        self.keys = _Keys(plan)
        self.idle: list[_Worker] = []
        self.children: set[subprocess.Popen] = set()
        self.stopping = False
        self.starting = threading.Lock()  # of idle, children and stopping
        gpus = _visible_gpus() if config.jobs > 1 else []
        self.gpus = itertools.cycle(gpus) if len(gpus) > 1 else None
        self.begin = time.perf_counter()

    def run(self) -> None:
        waiting = list(self.plan.stages)
        finished: set[str] = set()
        running: dict[Future, Stage] = {}
        with ThreadPoolExecutor(self.config.jobs) as pool, self._children_end():
            while waiting or running:
                ready = [s for s in waiting if finished.issuperset(s.needs)]
                for stage in ready[: self.config.jobs - len(running)]:
                    waiting.remove(stage)
                    work = self._start(stage, len(finished) + len(running) + 1)
                    if work is None:
                        finished.add(stage.name)
                    elif self._in_process(stage):
                        work()
                        finished.add(stage.name)
                    else:
                        running[pool.submit(work)] = stage
                if running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        finished.add(running.pop(future).name)

    @contextlib.contextmanager
    def _children_end(self) -> Iterator[None]:
        """With this block; where it fails, at once."""
        try:
            yield
        except BaseException:
            with self.starting:
                self.stopping = True  # none may be started between this and the end
                for child in self.children:
                    child.terminate()
            raise
        finally:
            with self.starting:
                self.stopping = True
                for worker in self.idle:
                    worker.close()
            for child in self.children:
                child.wait()

    def _in_process(self, stage: Stage) -> bool:
        return self.config.jobs == 1 and not self._launcher(stage)

    def _launcher(self, stage: Stage) -> list[str]:
        return shlex.split(self.config.launcher or "") if stage.command in TRAININGS else []

    def _start(self, stage: Stage, number: int) -> Any:
        """What there is to do for a stage, or None where it is finished."""
        settings = dict(stage.settings)
        if stage.tries:
            settings[stage.tuned] = read_settings(
                self.plan.folder, best_try(self.plan.folder, stage.tries)
            )[stage.tuned]
        path = self._path(stage, "yaml")
        key = self.keys.add(stage, settings)
        elapsed = time.perf_counter() - self.begin
        head = f"[{number}/{len(self.plan.stages)}] {stage.name}"
        output = Path(settings["output"])
        if self.keys.is_finished(stage):
            print(f"{head}: finished before", flush=True)
            return None
        record = read_record(self.plan.folder, stage)
        goes_on = output.exists() and record.get("key") == key
        if output.exists():
            self._make_room(stage, output, same=goes_on)
        print(f"{head}: {stage.command} ({elapsed:.0f} s elapsed)", flush=True)
        write_whole(path, yaml.safe_dump(settings, sort_keys=False))
        # The time of what is continued is not known.
        fresh = {"key": key} | ({"continued": True} if goes_on else {})
        self._record(stage, fresh)

        def work() -> None:
            start = time.perf_counter()
            if self._in_process(stage):
                self._call(stage, settings)
            else:
                self._send(stage, path)
            self._record(stage, fresh | {"seconds": round(time.perf_counter() - start, 1)})

        return work

    def _make_room(self, stage: Stage, output: Path, *, same: bool) -> None:
        """Before a stage is run: move another run's output away, delete an unfinished one that
        cannot be continued."""
        target = output.parent if stage.command == "augment" else output
        if not same:
            replaced = self.plan.folder / "replaced"
            replaced.mkdir(exist_ok=True)
            names = (replaced / f"{stage.slug}.{number}" for number in itertools.count(1))
            moved = next(path for path in names if not path.exists())
            os.replace(target, moved)
            print(f"{stage.name} has changed; the old one is now {moved}", flush=True)
        elif stage.command not in RESUMABLE:
            shutil.rmtree(target)

    def _call(self, stage: Stage, settings: dict[str, Any]) -> None:
        resume = {"resume": True} if stage.command in RESUMABLE else {}
        run_stage(stage, settings | resume)
        free_memory()

    def _send(self, stage: Stage, path: Path) -> None:
        """Run its command in another process, its output in its log."""
        words = [stage.command, "--config", str(path)]
        words += ["--resume"] if stage.command in RESUMABLE else []
        log = self._path(stage, "log")
        with log.open("w", encoding="utf-8") as file:
            if launcher := self._launcher(stage):
                command = [*launcher, "-m", "cot2align.train", *words]
                code = self._child(command, stdout=file, stderr=subprocess.STDOUT).wait()
            else:
                worker = self._idle_worker() or _Worker(
                    partial(self._child, env=self._share()), file
                )
                code = worker.run(words, log)
                if not code:
                    self._give_back(worker)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        lines = lines or ["it printed nothing"]
        if code:
            errors = [line for line in lines if line.startswith("error: ")]
            reason = (errors or lines)[-1].removeprefix("error: ")
            raise UserError(f"stage {stage.name}: exit code {code}: {reason} (see {log})")
        print(f"{stage.name}: {lines[-1]}", flush=True)

    def _idle_worker(self) -> _Worker | None:
        with self.starting:
            # One that waits may die, as of a lack of memory.
            self.idle = [worker for worker in self.idle if worker.process.poll() is None]
            return self.idle.pop() if self.idle else None

    def _give_back(self, worker: _Worker) -> None:
        with self.starting:
            self.idle.append(worker)
            if self.stopping:
                worker.close()

    def _share(self) -> dict[str, str]:
        """The environment of the next worker: its share of the cores, and one of several GPUs."""
        threads = max(1, (os.cpu_count() or 1) // self.config.jobs)
        gpu = {"CUDA_VISIBLE_DEVICES": next(self.gpus)} if self.gpus else {}
        return {"OMP_NUM_THREADS": str(threads), **os.environ, **gpu}

    def _child(self, command: list[str], **options: Any) -> subprocess.Popen:
        with self.starting:
            if self.stopping:
                raise UserError("not started: the study ends")
            child = subprocess.Popen(
                command,
                # A child that outlives this process keeps others away.
                pass_fds=(self.lock,),
                **options,
            )
            self.children.add(child)
        return child

    def _path(self, stage: Stage, ending: str) -> Path:
        return self.plan.folder / "stages" / f"{stage.slug}.{ending}"

    def _record(self, stage: Stage, record: dict[str, Any]) -> None:
        write_whole(self._path(stage, "json"), json.dumps(record) + "\n")


def _visible_gpus() -> list[str]:
    """By the names that CUDA_VISIBLE_DEVICES takes; as CUDA reads it, to the first that is none."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in visible.split(",")][:count]


class _Worker:
    """A process that runs stages one after the other, since its imports take seconds."""

    def __init__(self, start: Callable[..., subprocess.Popen], log: IO[str]):
        """log: for what goes wrong before the first stage."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = start([sys.executable, "-m", "cot2align.train.worker"], stderr=log, **pipes)
        self.tasks = cast(IO[str], self.process.stdin)
        self.answers = cast(IO[str], self.process.stdout)

    def run(self, words: list[str], log: Path) -> int:
        """Run a command line, what it prints in `log`; its exit code."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"words": words, "log": str(log)}), file=self.tasks, flush=True)
        return 0 if self.answers.readline() == DONE else self.process.wait() or 1

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.tasks.close()


def run_stage(stage: Stage, settings: dict[str, Any]) -> None:
    """Run its command in this process. Raises UserError, naming the stage."""
    config = stage.config(settings)
    try:
        run_module(stage.command).run(config)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def best_try(folder: Path, tries: Sequence[str]) -> str:
    """The name of the try with the least cross entropy on the validation rows at its end."""
    losses = {name: (kept_evaluation(folder / name) or {}).get("eval_ce") for name in tries}
    finite = {n: loss for n, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        raise UserError(f"no try of {', '.join(tries)} has a finite validation loss")
    return min(finite, key=finite.__getitem__)


def kept_evaluation(folder: Path) -> dict[str, Any] | None:
    """The evaluation of the weights that a training ended with: the best or the last one."""
    from cot2align.train.checkpoint import BEST_FILE

    entries = {entry["step"]: entry for entry in read_metrics(folder) if "eval_ce" in entry}
    best = folder / BEST_FILE
    step = json.loads(best.read_text(encoding="utf-8"))["step"] if best.is_file() else None
    return entries.get(step, next(reversed(entries.values()), None)) if entries else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The log of the training in a folder."""
    from cot2align.train.callbacks import METRICS_FILE

    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_record(folder: Path, stage: Stage) -> dict[str, Any]:
    """{"key", "seconds", "continued"} of a stage that is finished; "seconds" is missing of one that
    is not, "continued" is true of one that was interrupted and went on."""
    path = folder / "stages" / f"{stage.slug}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The settings that a stage was run with, also what was chosen for it by tries."""
    path = folder / "stages" / f"{name.replace('/', '-')}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def stage_to_check(config: RecipeCheck) -> Iterator[tuple[CheckConfig, list[str]]]:
    """The config of a method's first training, with inputs that are there, and notes on those that
    stand for what stages before it have not made yet. Raises UserError.

    A model that is to be trained has the shape that it begins with; rows come without the
    rationales that are to be written; rows and untrained models are made, in a temporary folder.
    """
    settings = dict(config.settings)
    study = dict(config.recipe)
    if "output" in settings:
        study["output"] = settings.pop("output")
    recipe = build(RecipeConfig, study)
    plan = make_plan(recipe)
    stage = _asked(plan, settings.pop("method", None))
    with tempfile.TemporaryDirectory() as folder:
        inputs = _Inputs(plan, Path(folder))
        values = {**stage.settings, **settings}
        for name in ("student", "teacher", "model", "train", "eval"):
            if values.get(name) is not None:
                values[name] = inputs.of(values[name])
        if isinstance(values.get("generate_data"), list):
            values["generate_data"] = [inputs.of(file) for file in values["generate_data"]]
        yield build(CheckConfig, values), [f"stage {stage.name} ({stage.command})", *inputs.notes]


def _asked(plan: Plan, name: str | None) -> Stage:
    """The first training of a teacher or method; none: of the first method that distils."""
    first = {name: next(iter(by_seed.values())) for name, by_seed in plan.trainings.items()}
    if name is not None:
        if name not in first:
            raise UserError(f"setting 'method': nothing trains {name!r}{nearest(name, first)}")
        return first[name]
    students = [stage for stage in first.values() if stage.name.startswith("students/")]
    return next((stage for stage in students if stage.command == "distill"), students[0])


class _Inputs:
    """A plan's files and folders, or what stands for them; notes say which that are."""

    def __init__(self, plan: Plan, folder: Path):
        self.keys = _Keys(plan)
        self.stages = {stage.name: stage for stage in plan.stages}
        self.makers = {stage.settings["output"]: stage for stage in plan.stages}
        self.folder = folder
        self.notes: list[str] = []

    def of(self, path: str) -> str:
        stage = self.makers.get(path) or self.makers.get(str(Path(path).parent))
        if stage is None or self.is_made(stage):
            return path
        if stage.command in TRAININGS:
            model = stage.settings["model" if stage.command == "sft" else "student"]
            self.note(f"{stage.name} is not trained yet: {model} in its place, of its shape")
            return self.of(model)
        if stage.command == "augment":
            data = stage.settings["data"]
            self.note(f"{stage.name} are not written yet: the rows of {data} as they are")
            return self.of(data)
        return self.made(stage, path)

    def is_made(self, stage: Stage) -> bool:
        # All of them: a key is made of those before it.
        before = [self.is_made(self.stages[name]) for name in stage.needs]
        self.keys.add(stage, stage.settings)
        return all(before) and self.keys.is_finished(stage)

    def made(self, stage: Stage, path: str) -> str:
        """`path`, which is or is in the stage's output, in the temporary folder."""
        output = self.folder / stage.name
        if not output.exists():
            self.note(f"{stage.name} is not made yet: made in a temporary folder")
            settings = {**stage.settings, "output": str(output)}
            if stage.command == "new-model":
                settings["data"] = self.of(settings["data"])
            with contextlib.redirect_stdout(io.StringIO()):
                run_stage(stage, settings)
        return str(output / Path(path).relative_to(stage.settings["output"]))

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
