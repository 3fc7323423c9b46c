"""A study's plan: one recipe, and the stages that it asks for.

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

Every setting of every stage is checked before the first one starts. A stage's name is its folder.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cot2align.train.__main__ import COMMANDS, TRAININGS, config_class
from cot2align.train.config import RecipeConfig, UserError, build, merged, nearest

if TYPE_CHECKING:
    from cot2align.train.data import Row

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


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

    def config(self, settings: dict[str, Any]) -> Any:
        """Its command's config from these settings. Raises UserError, naming the stage."""
        try:
            return build(config_class(self.command), settings)
        except UserError as error:
            raise UserError(f"stage {self.name}: {error}") from None


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
        self.read: dict[str, list[Row]] = {}  # by file

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
        self.check_rows(stage, stage.config(stage.settings))
        self.stages.append(stage)
        return stage

    def check_rows(self, stage: Stage, config: Any) -> None:
        """Raises UserError for files of rows that a training would refuse, some of them late."""
        if stage.command not in TRAININGS:
            return
        for file in config.generate_data if config.generate_rows else ():
            if self.folder.resolve() not in Path(file).resolve().parents:
                self.rows(f"stage {stage.name}: generate_data", file)
        for file in filter(None, (config.train, config.eval)):
            if config.texts == "cot" and not self.has_rationales(file):
                raise UserError(
                    f"stage {stage.name}: texts is cot, and no row of {file} has a rationale"
                    + ("; `eval: none` leaves them out" if file == config.eval else "")
                )
        crossed_only = stage.command == "distill" and config.ot and not config.cst
        if crossed_only and not self.has_rationales(config.train):
            raise UserError(
                f"stage {stage.name}: cst is off, and no row of {config.train} has a rationale"
            )

    def rows(self, where: str, path: str) -> list[Row]:
        """Of a file that is there. Raises UserError."""
        from cot2align.train.data import read_rows

        if not Path(path).is_file():
            raise UserError(f"{where}: no file {path}")
        if path not in self.read:
            self.read[path] = read_rows(path)
        return self.read[path]

    def has_rationales(self, path: str) -> bool:
        """False where it is known that no row of the file has, or will have, a rationale."""
        if Path(path).parent == self.folder / "data" and "source" in self.config.data:
            return not self.is_published
        return path not in self.read or any(row.rationale for row in self.read[path])

    def path(self, *names: str) -> str:
        return str(self.folder.joinpath(*names))

    def data(self) -> tuple[dict[str, str], Needs]:
        """The files train, validation (where there is one) and test, and what makes them."""
        given = self.config.data
        if "source" in given:
            from cot2align.train.prepare import source_of

            stage = self.add("data", "prepare", given | {"output": self.path("data")}, ())
            try:
                # No published data set has rationales.
                self.is_published = bool(source_of(stage.config(stage.settings)).hub)
            except UserError as error:
                raise UserError(f"section 'data': {error}") from None
            splits = [n for n in SPLITS if given.get(f"{n}_rows") != 0]
            return {name: self.path("data", f"{name}.jsonl") for name in splits}, ("data",)
        for name in given:
            if name not in SPLITS:
                raise UserError(f"section 'data': unknown setting {name!r}{nearest(name, SPLITS)}")
        for name in ("train", "test"):
            if name not in given:
                raise UserError(f"section 'data': setting {name!r} is missing (a JSON Lines file)")
        for name, path in given.items():
            self.rows(f"section 'data': {name}", str(path))
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
        for each in stage.config(stage.settings).on:
            self.rows("section 'evaluate': on", str(Path(settings["data"], each, "test.jsonl")))
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
        evaluated = other.config(other.settings)
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


STAGE_COMMANDS = [command for command in COMMANDS if command not in ("run", "demo")]


def _known(command: str) -> set[str]:
    return {f.name for f in fields(config_class(command))}


def _shared(students: dict[str, Any], command: str) -> dict[str, Any]:
    """The settings of the section `students` that the command has."""
    settings = dict(students)
    if command == "sft" and "student" in settings:
        settings["model"] = settings.pop("student")
    return {name: value for name, value in settings.items() if name in _known(command)}
