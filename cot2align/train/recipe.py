"""The command `run`: a whole study from one file, to one table.

A recipe names the data, the teachers, and a student for each method and seed. It is planned as
stages, each one of the other commands with its settings:

    data             prepare      unless the recipe names files
    models/NAME      new-model    untrained models, where the recipe asks for them
    teachers/NAME    sft
    rationales       augment      by the first teacher
    tuning/METHOD/SETTING-VALUE   distill or sft, tries on the validation rows
    students/METHOD/seed-N        distill or sft
    scores/...       evaluate     every teacher and student
    judge/METHOD     judge

Every setting of every stage is checked before the first one starts. A stage's name is its folder;
`stages/` holds its settings as a YAML file that the command itself takes, and a record of what it
was made from: its settings, the stages before it and the contents of the files it reads. A stage
whose record is the same is not run again, one that was interrupted goes on where it was, and one
that has changed is run anew, with the old folder moved to `replaced/`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from cot2align.train.__main__ import (
    COMMANDS,
    config_class,
    handled,
    interrupt_ends_process,
    run_module,
)
from cot2align.train.config import (
    CheckConfig,
    RecipeCheck,
    RecipeConfig,
    UserError,
    build,
    counted,
    merged,
    nearest,
    to_yaml,
)
from cot2align.train.files import write_whole

RECIPE_FILE = "recipe.yaml"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
TRAININGS = ("sft", "distill")
RESUMABLE = (*TRAININGS, "augment", "evaluate", "judge")


@dataclass(frozen=True)
class Stage:
    """One command with its settings; `needs` names the stages whose output it reads.

    tries: stages that differ in `tuned` alone, whose best value this one takes.
    """

    name: str
    command: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    tries: tuple[str, ...] = ()
    tuned: str = ""

    @property
    def slug(self) -> str:
        return self.name.replace("/", "-")


@dataclass(frozen=True)
class Plan:
    """The stages of a recipe, each after those that it needs.

    titles: of each teacher and method, in the report's order. scores, trainings: by its name, then
    by training seed (None for a teacher), the stage that evaluates or trains it; a teacher that is
    used as it is has no training.
    """

    folder: Path
    stages: tuple[Stage, ...]
    titles: dict[str, str]
    scores: dict[str, dict[int | None, Stage]]
    trainings: dict[str, dict[int | None, Stage]]
    jobs: int


def run(config: RecipeConfig) -> dict[str, Any]:
    """Run what is not finished, then write the report; returns `report.collect`'s results.

    Raises UserError.
    """
    with interrupt_ends_process():
        from cot2align.train import report

    plan = make_plan(config)
    with _locked(plan.folder) as lock, _terminated_like_interrupted():
        write_whole(plan.folder / RECIPE_FILE, to_yaml(config))
        _Runner(plan, config, lock).run()
        return report.write(plan)


def make_plan(config: RecipeConfig) -> Plan:
    """The recipe's stages. Raises UserError, naming the section, for whatever is wrong in it."""
    return _Planner(config).plan()


Needs = tuple[str, ...]  # names of stages


class _Planner:
    """Adds the stages section by section, each checked as it is added."""

    def __init__(self, config: RecipeConfig):
        _check_sections(config)
        self.config = config
        self.folder = Path(config.output)
        self.common = {"device": config.device, **config.common}
        self.stages: list[Stage] = []
        self.titles: dict[str, str] = {}
        self.trainings: dict[str, dict[int | None, Stage]] = {}
        self.scores: dict[str, dict[int | None, Stage]] = {}
        self.teachers: dict[str, tuple[str, Needs]] = {}  # name -> its model, what makes it

    def plan(self) -> Plan:
        config = self.config
        data, data_needs = self.data()
        for name, settings in config.models.items():
            made = settings | {"data": data["train"], "output": self.path("models", name)}
            self.add(f"models/{name}", "new-model", made, data_needs)
        names = {"train": "train", "eval": "validation"}
        rows = {setting: data[name] for setting, name in names.items() if name in data}
        for name in self.used_teachers():
            self.teacher(name, dict(config.teachers[name]), rows, data_needs)
        rows_needs = data_needs
        if config.rationales is not None:
            rows["train"], rows_needs = self.rationales(data["train"], data_needs)
        for name, (model, needs) in self.teachers.items():
            stage = self.evaluation(f"teachers/{name}", model, data, (*data_needs, *needs))
            self.scores[name] = {None: stage}
        for name in config.only or config.methods:
            settings = config.methods[name]
            self.method(name, dict(settings), data, rows, rows_needs)
        if config.judge is not None:
            self.judge(dict(config.judge), data["test"], data_needs)
        stages = tuple(self.stages)
        return Plan(self.folder, stages, self.titles, self.scores, self.trainings, config.jobs)

    def add(
        self, name: str, command: str, settings: dict[str, Any], needs: Needs, **tuning: Any
    ) -> Stage:
        known = _known(command)
        shared = {key: value for key, value in self.common.items() if key in known}
        stage = Stage(name, command, merged(shared, settings), needs, **tuning)
        if any(other.name == name for other in self.stages):
            raise UserError(f"stage {name} would come twice: are two seeds or values the same?")
        _built(stage, stage.settings)
        self.stages.append(stage)
        return stage

    def path(self, *names: str) -> str:
        return str(self.folder.joinpath(*names))

    def data(self) -> tuple[dict[str, str], Needs]:
        """The files train, validation (where there is one) and test, and what makes them."""
        given = self.config.data
        if "source" in given:
            self.add("data", "prepare", given | {"output": self.path("data")}, ())
            splits = [n for n in SPLITS if given.get(f"{n}_rows") != 0]
            return {name: self.path("data", f"{name}.jsonl") for name in splits}, ("data",)
        for name in given:
            if name not in SPLITS:
                raise UserError(f"section 'data': unknown setting {name!r}{nearest(name, SPLITS)}")
        for name in ("train", "test"):
            if name not in given:
                raise UserError(f"section 'data': setting {name!r} is missing (a JSON Lines file)")
        for name, path in given.items():
            if not Path(str(path)).is_file():
                raise UserError(f"section 'data': {name}: no file {path}")
            _check_rows(str(path))
        return {name: str(path) for name, path in given.items()}, ()

    def model(self, where: str, value: Any) -> tuple[str, Needs]:
        """A model of the recipe or, else, a folder or hub name; and what makes it."""
        name = _text(where, value)
        if name in self.config.models:
            return self.path("models", name), (f"models/{name}",)
        if not Path(name).is_dir():
            if "/" not in name and difflib.get_close_matches(name, self.config.models):
                near = nearest(name, self.config.models)
                raise UserError(f"{where}: unknown model {name!r}{near}")
            if not HUB_NAME.fullmatch(name):
                raise UserError(f"{where}: no folder {name}, and no hub model has such a name")
        return name, ()

    def used_teachers(self) -> list[str]:
        """All of them or, with `only`, the first where it writes rationales and the methods'."""
        names = list(self.config.teachers)
        if not self.config.only:
            return names
        default = self.config.students.get("teacher", *names[:1])
        methods = [self.config.methods[name] for name in self.config.only]
        used = {m.get("teacher", default) for m in methods if m.get("command") != "sft"}
        writes = names[:1] if self.config.rationales is not None else []
        return [name for name in names if name in used or name in writes]

    def teacher(
        self, name: str, settings: dict[str, Any], rows: dict[str, str], needs: Needs
    ) -> None:
        default = name if "teacher" in name else f"teacher {name}"
        where = f"section 'teachers.{name}'"
        self.titles[name] = _text(f"{where}: title", settings.pop("title", default))
        is_trained = settings.pop("sft", True)
        if not isinstance(is_trained, bool):
            raise UserError(f"{where}: sft: expected true or false")
        if "model" not in settings:
            raise UserError(f"{where}: setting 'model' is missing")
        settings["model"], model_needs = self.model(f"{where}: model", settings["model"])
        if not is_trained:
            self.teachers[name] = settings["model"], model_needs
            return
        output = self.path("teachers", name)
        settings = {"seed": self.config.seeds[0], **rows, **settings, "output": output}
        stage = self.add(f"teachers/{name}", "sft", settings, (*needs, *model_needs))
        self.trainings[name] = {None: stage}
        self.teachers[name] = output, (stage.name,)

    def rationales(self, train: str, needs: Needs) -> tuple[str, Needs]:
        """The rows with the first teacher's rationales, and what makes them."""
        if not self.teachers:
            raise UserError("section 'rationales' needs a teacher; section 'teachers' is empty")
        model, model_needs = next(iter(self.teachers.values()))
        output = self.path("rationales", "train.jsonl")
        settings = {"seed": self.config.seeds[0], **(self.config.rationales or {})}
        settings |= {"model": model, "data": train, "output": output}
        self.add("rationales", "augment", settings, (*needs, *model_needs))
        return output, ("rationales",)

    def evaluation(self, name: str, model: str, data: dict[str, str], needs: Needs) -> Stage:
        settings = {"data": data["test"], **self.config.evaluate}
        settings |= {"model": model, "output": self.path("scores", name)}
        stage = self.add(f"scores/{name}", "evaluate", settings, needs)
        for each in _built(stage, stage.settings).on:
            file = Path(settings["data"], each, "test.jsonl")
            if not file.is_file():
                raise UserError(f"section 'evaluate': on: no file {file}")
            _check_rows(str(file))
        return stage

    def method(
        self,
        name: str,
        own: dict[str, Any],
        data: dict[str, str],
        rows: dict[str, str],
        needs: Needs,
    ) -> None:
        where = f"section 'methods.{name}'"
        self.titles[name] = _text(f"{where}: title", own.pop("title", name))
        command = str(own.pop("command", "distill"))
        if command not in TRAININGS:
            raise UserError(f"{where}: expected command sft or distill, got {command!r}")
        settings = rows | _shared(self.config.students, command) | own
        side = "student" if command == "distill" else "model"
        if side not in settings:
            raise UserError(f"section 'students': setting 'student' is missing (for {name})")
        place = f"{where}: {side}" if side in own else "section 'students': student"
        settings[side], model_needs = self.model(place, settings[side])
        needs += model_needs
        if command == "distill":
            if "teacher" not in settings and not self.teachers:
                raise UserError(f"method {name}: no teacher; section 'teachers' is empty")
            of = where if "teacher" in own else "section 'students'"
            teacher = settings["teacher"] if "teacher" in settings else next(iter(self.teachers))
            settings["teacher"], teacher_needs = self.teacher_of(of, teacher)
            needs += teacher_needs
        tuning = self.tries(name, command, settings, own, needs)
        self.trainings[name], self.scores[name] = {}, {}
        for seed in self.config.seeds:
            output = self.path("students", name, f"seed-{seed}")
            stage = self.add(
                f"students/{name}/seed-{seed}",
                command,
                settings | {"seed": seed, "output": output},
                (*needs, *tuning.get("tries", ())),
                **tuning,
            )
            self.trainings[name][seed] = stage
            self.scores[name][seed] = self.evaluation(
                f"{name}/seed-{seed}", output, data, (stage.name,)
            )

    def teacher_of(self, where: str, value: Any) -> tuple[str, Needs]:
        """A teacher of the recipe, a model of it, a folder, or a hub name OWNER/NAME."""
        teacher = _text(f"{where}: teacher", value)
        if teacher in self.teachers:
            return self.teachers[teacher]
        is_model = "/" in teacher or teacher in self.config.models or Path(teacher).is_dir()
        if not is_model or difflib.get_close_matches(teacher, self.teachers):
            near = nearest(teacher, self.teachers) if self.teachers else ""
            raise UserError(f"{where}: unknown teacher {teacher!r}{near}")
        return self.model(f"{where}: teacher", teacher)

    def judge(self, settings: dict[str, Any], test: str, needs: Needs) -> None:
        """Every method against one of them, with the predictions of the first seed."""
        known = _known("judge") | {"against"}
        for name in settings:
            if name not in known:
                raise UserError(f"section 'judge': unknown setting {name!r}{nearest(name, known)}")
        against = str(settings.pop("against", None))
        if against not in self.scores or against in self.teachers:
            methods = [name for name in self.scores if name not in self.teachers]
            raise UserError(
                f"section 'judge': against: expected a method that is run ({', '.join(methods)}), "
                f"got {against}"
            )
        variable = settings.get("api_key_env")
        if variable and variable not in os.environ:
            raise UserError(f"section 'judge': the environment has no variable {variable}")
        first = self.config.seeds[0]
        other = self.scores[against][first]
        evaluated = _built(other, other.settings)
        asked, made = settings.get("prompt", "standard"), evaluated.prompts
        if asked not in made:
            raise UserError(
                f"section 'judge': prompt {asked} is not evaluated, only {', '.join(made)}"
            )
        if evaluated.on and not {"set", "data"} <= settings.keys():
            raise UserError(
                "section 'judge': with several test sets, `set` names one and `data` its rows"
            )
        settings = {"data": test, **settings, "b": other.settings["output"]}
        for name, by_seed in self.scores.items():
            if name == against or name in self.teachers:
                continue
            scored = by_seed[first]
            settings |= {"a": scored.settings["output"], "output": self.path("judge", name)}
            self.add(f"judge/{name}", "judge", settings, (*needs, scored.name, other.name))

    def tries(
        self, name: str, command: str, settings: dict[str, Any], own: dict[str, Any], needs: Needs
    ) -> dict[str, Any]:
        """Add a try for every value; Stage's `tries` and `tuned`, or nothing to tune."""
        tune = dict(self.config.tune)
        lists = [key for key, value in tune.items() if isinstance(value, list)]
        if not tune or (len(lists) == 1 and (lists[0] in own or lists[0] not in _known(command))):
            return {}
        if len(lists) != 1 or not tune[lists[0]]:
            raise UserError(
                "section 'tune': expected one setting with a list of values, got "
                f"{'an empty one' if len(lists) == 1 else len(lists)}"
            )
        if "eval" not in settings:
            raise UserError("section 'tune' needs validation rows; section 'data' has none")
        (setting,) = lists
        stages = []
        for value in tune.pop(setting):
            output = self.path("tuning", name, f"{setting}-{value}")
            # A value under which the training diverges is a result, not an error.
            stage_settings = {**settings, "on_nan": "skip", **tune, setting: value}
            stage_settings["output"] = output
            stage_settings |= {"seed": self.config.seeds[0]}
            stages.append(
                self.add(f"tuning/{name}/{setting}-{value}", command, stage_settings, needs).name
            )
        return {"tries": tuple(stages), "tuned": setting}


SPLITS = ("train", "validation", "test")


def _check_sections(config: RecipeConfig) -> None:
    if not config.methods:
        raise UserError("section 'methods' is empty: nothing to train")
    if not config.seeds:
        raise UserError("setting 'seeds' is empty: nothing to train")
    for kind in ("models", "teachers", "methods"):
        for name, settings in getattr(config, kind).items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise UserError(
                    f"section {kind!r}: {name!r} names a folder: expected text of letters, digits, "
                    "+ . _ - only"
                )
            if not isinstance(settings, dict):
                raise UserError(
                    f"section '{kind}.{name}': expected `name: value` lines, got {settings!r}"
                )
    if config.launcher:
        if config.jobs > 1:
            raise UserError(f"'jobs' is {config.jobs} and 'launcher' is set: launch one at a time")
        try:
            program = " ".join(shlex.split(config.launcher)[:1])
        except ValueError as error:
            raise UserError(f"setting 'launcher': {config.launcher!r}: {error}") from None
        if shutil.which(program) is None:
            raise UserError(f"setting 'launcher': no program {program!r}")
    for name in config.only:
        if name not in config.methods:
            raise UserError(f"'only': unknown method {name!r}{nearest(name, config.methods)}")
    for name in config.methods:
        if name in config.teachers:
            raise UserError(f"{name!r} is a teacher and a method; choose two names")
    known = {name for command in STAGE_COMMANDS for name in _known(command)}
    for name in config.common:
        if name not in known:
            raise UserError(f"section 'common': unknown setting {name!r}{nearest(name, known)}")
    known = {name for command in TRAININGS for name in _known(command)}
    for section in ("students", "tune"):
        for name in getattr(config, section):
            if name not in known:
                near = nearest(name, known)
                raise UserError(f"section {section!r}: unknown setting {name!r}{near}")
    for where, settings in _sections(config):
        # A method's seed would be overruled by the study's.
        trained = where == "section 'students'" or where.startswith("section 'methods.")
        for name in ("output", "resume", *(["seed"] if trained else [])):
            if name in settings:
                raise UserError(f"{where}: setting {name!r} is the study's own, leave it out")


def _sections(config: RecipeConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of settings, with its place in the recipe."""
    for kind in ("data", "common", "students", "rationales", "tune", "evaluate", "judge"):
        yield f"section {kind!r}", getattr(config, kind) or {}
    for kind in ("models", "teachers", "methods"):
        for name, settings in getattr(config, kind).items():
            yield f"section '{kind}.{name}'", settings


def _text(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise UserError(f"{where}: expected text, got {value!r}")
    return str(value)


def _check_rows(path: str) -> None:
    """Raises UserError for a file of rows that a later stage would refuse."""
    from cot2align.train.data import read_rows

    read_rows(path)


def best_try(folder: Path, tries: Sequence[str]) -> str:
    """The name of the try with the least cross entropy on the validation rows at its end."""
    losses = {name: (kept_evaluation(folder / name) or {}).get("eval_ce") for name in tries}
    finite = {n: loss for n, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        raise UserError(f"no try of {', '.join(tries)} has a finite validation loss")
    return min(finite, key=finite.__getitem__)


STAGE_COMMANDS = [command for command in COMMANDS if command not in ("run", "demo")]


def _built(stage: Stage, settings: dict[str, Any]) -> Any:
    try:
        return build(config_class(stage.command), settings)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def run_stage(stage: Stage, settings: dict[str, Any]) -> None:
    """Run its command in this process. Raises UserError, naming the stage."""
    config = _built(stage, settings)
    try:
        run_module(stage.command).run(config)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def _known(command: str) -> set[str]:
    return {f.name for f in fields(config_class(command))}


def _shared(students: dict[str, Any], command: str) -> dict[str, Any]:
    """The settings of the section `students` that the command has."""
    settings = dict(students)
    if command == "sft" and "student" in settings:
        settings["model"] = settings.pop("student")
    return {name: value for name, value in settings.items() if name in _known(command)}


def kept_evaluation(folder: Path) -> dict[str, Any] | None:
    """The evaluation of the weights that a training ended with: the best or the last one."""
    from cot2align.train.callbacks import METRICS_FILE
    from cot2align.train.checkpoint import BEST_FILE

    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    entries = {entry["step"]: entry for line in lines if "eval_ce" in (entry := json.loads(line))}
    best = folder / BEST_FILE
    step = json.loads(best.read_text(encoding="utf-8"))["step"] if best.is_file() else None
    return entries.get(step, next(reversed(entries.values()), None)) if entries else None


def _terminated_like_interrupted() -> contextlib.AbstractContextManager[None]:
    """SIGTERM leaves through the same door as Ctrl-C, which takes the children along."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    return handled(signal.SIGTERM, leave)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The study's folder, new, empty or a study already, for this process and its children alone;
    the lock's file descriptor, which they inherit."""
    import fcntl

    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file, expected a folder")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if there - {"stages", f"{RECIPE_FILE}.partial"} and RECIPE_FILE not in there:
        raise UserError(f"output folder {folder} is not empty and holds no study; choose another")
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    with (folder / "stages" / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is at work on {folder}") from None
        yield lock.fileno()


class _Runner:
    """Runs a plan's stages, one after the other or several at a time."""

    def __init__(self, plan: Plan, config: RecipeConfig, lock: int):
        self.plan = plan
        self.config = config
        self.lock = lock
        self.keys: dict[str, str] = {}
        self.hashes: dict[str, str] = {}
        self.children: set[subprocess.Popen] = set()
        self.stopping = False
        self.starting = threading.Lock()  # of children and stopping
        self.begin = time.perf_counter()

    def run(self) -> None:
        waiting = list(self.plan.stages)
        finished: set[str] = set()
        running: dict[Future, Stage] = {}
        with ThreadPoolExecutor(self.config.jobs) as pool:
            try:
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
            except BaseException:
                with self.starting:
                    self.stopping = True
                    for child in self.children:
                        child.terminate()
                raise

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
        key = self.key(stage, settings)
        self.keys[stage.name] = key
        elapsed = time.perf_counter() - self.begin
        head = f"[{number}/{len(self.plan.stages)}] {stage.name}"
        output = Path(settings["output"])
        if self.is_finished(stage, key):
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
                self._spawn(stage, path)
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

    def _spawn(self, stage: Stage, path: Path) -> None:
        words = [*(self._launcher(stage) or [sys.executable]), "-m", "cot2align.train"]
        words += [stage.command, "--config", str(path)]
        words += ["--resume"] if stage.command in RESUMABLE else []
        threads = max(1, (os.cpu_count() or 1) // self.config.jobs)
        log = self._path(stage, "log")
        with log.open("w", encoding="utf-8") as file:
            with self.starting:
                if self.stopping:
                    raise UserError(f"stage {stage.name}: not started")
                child = subprocess.Popen(
                    words,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={"OMP_NUM_THREADS": str(threads), **os.environ},
                    # A child that outlives this process keeps others away.
                    pass_fds=(self.lock,),
                )
                self.children.add(child)
            code = child.wait()
            with self.starting:
                self.children.discard(child)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["done"]
        if code:
            errors = [line for line in lines if line.startswith("error: ")]
            reason = (errors or lines)[-1].removeprefix("error: ")
            raise UserError(f"stage {stage.name}: exit code {code}: {reason} (see {log})")
        print(f"{stage.name}: {lines[-1]}", flush=True)

    def is_finished(self, stage: Stage, key: str) -> bool:
        record = read_record(self.plan.folder, stage)
        is_there = Path(stage.settings["output"]).exists()
        return record.get("key") == key and "seconds" in record and is_there

    def key(self, stage: Stage, settings: dict[str, Any]) -> str:
        """What the stage is made from, as a hash; `keys` has those of the stages that it needs."""
        kept = counted(_built(stage, settings))
        lists = (value if isinstance(value, list) else [value] for value in kept.values())
        values = {value for some in lists for value in some if isinstance(value, str)}
        made = {
            "command": stage.command,
            "settings": {name: self._inside(value) for name, value in kept.items()},
            "needs": [self.keys[name] for name in stage.needs],
            "files": {v: self._hash(v) for v in sorted(values) if self._is_outside(v)},
        }
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]

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

    def _path(self, stage: Stage, ending: str) -> Path:
        return self.plan.folder / "stages" / f"{stage.slug}.{ending}"

    def _record(self, stage: Stage, record: dict[str, Any]) -> None:
        write_whole(self._path(stage, "json"), json.dumps(record) + "\n")


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
        inputs = _Inputs(plan, recipe, Path(folder))
        values = {**stage.settings, **settings}
        for name in ("student", "teacher", "model", "train"):
            if name in values:
                values[name] = inputs.of(values[name])
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

    def __init__(self, plan: Plan, config: RecipeConfig, folder: Path):
        self.runner = _Runner(plan, config, lock=-1)
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
        key = self.runner.keys[stage.name] = self.runner.key(stage, stage.settings)
        return all(before) and self.runner.is_finished(stage, key)

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
