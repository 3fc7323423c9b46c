"""Studies: planned whole before anything runs, resumed by content, reported in one table."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from cot2align.train import new_model
from cot2align.train.config import (
    CheckConfig,
    NewModelConfig,
    RecipeCheck,
    RecipeConfig,
    UserError,
    build,
    from_sources,
)
from cot2align.train.recipe import make_plan
from cot2align.train.study import _Runner, _Worker, best_try, run, stage_to_check
from tests.conftest import cli, command_process, interrupt, sample_rows, write_rows
from tests.train.loopback import serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    counts = {"train": 8, "validation": 3, "test": 4}
    return {n: write_rows(folder / f"{n}.jsonl", sample_rows(k)) for n, k in counts.items()}


def recipe(data, output, **sections) -> dict:
    """Two new models, a teacher, a fine-tuned and a distilled student with tuning."""
    return {
        "output": str(output),
        "device": "cpu",
        "data": data,
        "models": {
            "large": {"shape": "llama", "tokenizer": "unigram", "pieces": 400, "width": 16}
            | {"heads": 2, "layers": 1},
            "small": {"pieces": 380, "width": 16, "heads": 2, "layers": 1},
        },
        "common": {
            "max_length": 192,
            "max_new_tokens": 8,
            "max_prompt_length": 128,
            "max_steps": 2,
        },
        "teachers": {"teacher": {"model": "large"}},
        "students": {"student": "small", "ot_iters": 5},
        "methods": {"sft": {"command": "sft"}, "uld": {"kd": "uld", "learning_rate": 1e-3}},
        "tune": {"learning_rate": [1e-3, 1e-1], "max_steps": 1},
        "evaluate": {"prompts": ["standard", "cot"], "seeds": []},
        **sections,
    }


def planned(data, output, **sections):
    return make_plan(build(RecipeConfig, recipe(data, output, **sections)))


def test_plan(data, tmp_path) -> None:
    plan = planned(data, tmp_path / "s", seeds=[10, 20], rationales={"max_new_tokens": 4})
    assert [stage.name for stage in plan.stages] == [
        *("models/large", "models/small", "teachers/teacher", "rationales"),
        *("scores/teachers/teacher", "tuning/sft/learning_rate-0.001"),
        *("tuning/sft/learning_rate-0.1", "students/sft/seed-10", "scores/sft/seed-10"),
        *("students/sft/seed-20", "scores/sft/seed-20"),
        *("students/uld/seed-10", "scores/uld/seed-10", "students/uld/seed-20"),
        "scores/uld/seed-20",
    ]
    stages = {stage.name: stage for stage in plan.stages}
    student = stages["students/uld/seed-20"]
    assert student.settings == {
        "device": "cpu",
        "max_length": 192,
        "max_new_tokens": 8,
        "max_prompt_length": 128,
        "max_steps": 2,
        "train": str(tmp_path / "s" / "rationales" / "train.jsonl"),
        "eval": data["validation"],
        "student": str(tmp_path / "s" / "models" / "small"),
        "ot_iters": 5,
        "kd": "uld",
        "learning_rate": 1e-3,
        "teacher": str(tmp_path / "s" / "teachers" / "teacher"),
        "seed": 20,
        "output": str(tmp_path / "s" / "students" / "uld" / "seed-20"),
    }
    assert set(student.needs) == {"rationales", "models/small", "teachers/teacher"}
    assert "ot_iters" not in stages["students/sft/seed-10"].settings
    assert not (tmp_path / "s").exists()


def test_only_some_methods_and_the_teachers_that_they_use(data, tmp_path) -> None:
    teachers = {"one": {"model": "large"}, "two": {"model": "large", "sft": False}}
    methods = {"a": {}, "b": {"teacher": "two"}, "c": {"teacher": "some/hub-model"}}
    sections = {"teachers": teachers, "methods": methods, "tune": {}}
    names = [s.name for s in planned(data, tmp_path, only=["b"], **sections).stages]
    assert names == [
        *("models/large", "models/small", "scores/teachers/two"),
        *("students/b/seed-10", "scores/b/seed-10"),
    ]
    stages = {s.name: s for s in planned(data, tmp_path, **sections).stages}
    assert stages["students/c/seed-10"].settings["teacher"] == "some/hub-model"
    assert stages["students/a/seed-10"].settings["teacher"] == str(tmp_path / "teachers" / "one")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"methods": {}}, "section 'methods' is empty"),
        ({"methods": {"a/b": {}}}, "'a/b' names a folder"),
        ({"methods": {"a": "uld"}}, "section 'methods.a': expected `name: value` lines, got 'uld'"),
        (
            {"methods": {"a": {"kd": "udl"}}},
            "stage tuning/a/learning_rate-0.001: setting 'kd': unknown value",
        ),
        ({"methods": {"a": {"kdd": "uld"}}}, "unknown setting 'kdd'; did you mean 'kd'?"),
        ({"methods": {"a": {"command": "train"}}}, "expected command sft or distill, got 'train'"),
        ({"methods": {"teacher": {}}}, "'teacher' is a teacher and a method"),
        ({"teachers": {}}, "method uld: no teacher"),
        ({"teachers": {"t": {}}}, "section 'teachers.t': setting 'model' is missing"),
        ({"students": {}}, "setting 'student' is missing"),
        ({"students": {"studnet": "x"}}, "unknown setting 'studnet'; did you mean 'student'?"),
        ({"common": {"max_lenght": 3}}, "unknown setting 'max_lenght'; did you mean 'max_length'?"),
        ({"data": {"train": "x"}}, "section 'data': setting 'test' is missing"),
        ({"data": {"train": "nowhere.jsonl", "test": "x"}}, "section 'data': test: no file x"),
        ({"data": {"training": "x"}}, "unknown setting 'training'; did you mean 'train'?"),
        ({"tune": {"learning_rate": 1e-3}}, "expected one setting with a list of values, got 0"),
        ({"tune": {"learning_rate": ["high"]}}, "setting 'learning_rate': expected number"),
        ({"seeds": []}, "setting 'seeds' is empty"),
        ({"only": ["dskd"]}, "'only': unknown method 'dskd'"),
        ({"seeds": [10, 10]}, "stage students/sft/seed-10 would come twice"),
        ({"methods": {"a": {"teacher": "teacherr"}}}, "unknown teacher 'teacherr'; did you mean"),
        ({"launcher": "torchrn -x"}, "setting 'launcher': no program 'torchrn'"),
        ({"launcher": "'torchrun"}, "setting 'launcher': \"'torchrun\": No closing quotation"),
        ({"launcher": "python", "jobs": 2}, "'jobs' is 2 and 'launcher' is set"),
        ({"evaluate": {"max_new_tokens": 192}}, "max_new_tokens 192 must be below max_length 192"),
        (
            {"evaluate": {"data": "x", "on": ["a"]}},
            "section 'evaluate': on: no file x/a/test.jsonl",
        ),
        ({"judge": {"against": "x"}}, "against: expected a method that is run (sft, uld), got x"),
        (
            {"judge": {"against": "sft", "api_key_env": "NO_SUCH_KEY"}},
            "section 'judge': the environment has no variable NO_SUCH_KEY",
        ),
        ({"judge": {"against": "sft"}}, "stage judge/uld: setting 'server' is missing"),
        ({"evaluate": {"prompts": ["cott"]}}, "stage scores/teachers/teacher: setting 'prompts'"),
        ({"rationales": {"temperature": 0}}, "setting 'temperature' must be greater than 0"),
        ({"models": {"large": {"shape": "bert"}}}, "setting 'shape': unknown value 'bert'"),
        ({"data": []}, "section 'data': expected `name: value` lines, got []"),
        ({"methods": ["uld"]}, "section 'methods': expected `name: value` lines, got ['uld']"),
        ({"methods": {1: {}}}, "section 'methods': 1 names a folder: expected text of"),
        ({"methods": {"a": {"teacher": "xyz"}}}, "'methods.a': unknown teacher 'xyz'; known: teac"),
        ({"methods": {"a": {"teacher": None}}}, "'methods.a': teacher: expected text, got None"),
        ({"methods": {"a": {"title": ["x"]}}}, "'methods.a': title: expected text, got ['x']"),
        ({"methods": {"a": {"seed": 3}}}, "'methods.a': setting 'seed' is the study's own"),
        ({"common": {"output": "x"}}, "section 'common': setting 'output' is the study's own"),
        ({"teachers": {"t": {"model": ["large"]}}}, "'teachers.t': model: expected text, got ['l"),
        ({"teachers": {"t": {"model": "larg"}}}, "unknown model 'larg'; did you mean 'large'?"),
        ({"teachers": {"t": {"model": "/no/where"}}}, "'teachers.t': model: no folder /no/where"),
        ({"students": {"student": "a/b/c"}}, "section 'students': student: no folder a/b/c"),
        ({"tune": {"learning_rat": [1]}}, "section 'tune': unknown setting 'learning_rat'; did"),
        ({"tune": {"learning_rate": []}}, "one setting with a list of values, got an empty one"),
        ({"evaluate": {"on": None}}, "setting 'on': expected list of text, got None"),
        ({"judge": {"against": "uld", "modell": "x"}}, "section 'judge': unknown setting 'modell'"),
        ({"launcher": " "}, "setting 'launcher': no program ''"),
        ({"jobs": 0}, "setting 'jobs' must be at least 1, got 0"),
        ({"evalute": {}}, "unknown setting 'evalute'; did you mean 'evaluate'?"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(
    data, tmp_path, capsys, sections, said
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, tmp_path / "study") | sections))
    assert cli("run", config=path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "setting 'output' is missing (folder of the study"),
        ("# nothing\n", "setting 'output' is missing (folder of the study"),
        ("- a\n", "expected `name: value` lines, got a list"),
        (
            "output: o\nevaluate:\n\tprompts: [cot]\n",
            "line 3 not valid YAML: found character '\\t'",
        ),
        ("output: o\nseeds: [1]\noutput: p\n", "line 3 not valid YAML: 'output' is given twice"),
        ("methods:\n  a: {kd: uld, kd: dskd}\n", "line 2 not valid YAML: 'kd' is given twice"),
        ("methods:\n  a: {}\n  a: {}\n", "line 3 not valid YAML: 'a' is given twice"),
        ("output: o\n---\noutput: p\n", "line 2 not valid YAML: but found another document"),
        ("base: [a]\n", "'base': expected a file, got ['a']"),
        ("base: nowhere.yaml\n", "nowhere.yaml: No such file"),
        ("base: recipe.yaml\n", "recipe.yaml has a base of its own"),
        ("output: !!python/name:os.system ''\n", "could not determine a constructor for the tag"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content, said, tmp_path, capsys) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert cli("run", config=path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert [*tmp_path.iterdir()] == [path]


def test_a_name_may_stand_again_where_it_is_merged(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(
        "output: o\nmethods:\n  a: &a {kd: uld, alpha: 0.1}\n"
        "  b: &b {<<: *a, kd: dskd}\n  c: {<<: *b, alpha: 0.2}\n"
    )
    methods = from_sources(RecipeConfig, str(tmp_path / "r.yaml"), {}).methods
    assert methods["b"] == {"kd": "dskd", "alpha": 0.1}
    assert methods["c"] == {"kd": "dskd", "alpha": 0.2}


def test_broken_rows_are_found_before_anything_runs(data, tmp_path, capsys) -> None:
    broken = tmp_path / "test.jsonl"
    broken.write_text('{"instr')
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe({**data, "test": str(broken)}, tmp_path / "study")))
    assert cli("run", config=path) == 2
    assert f"error: {broken}:1: broken JSON" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupted_study_goes_on(jobs, data, tmp_path) -> None:
    """Ctrl-C goes to all processes of a terminal; none of them stays."""
    study = tmp_path / "study"
    path = tmp_path / "recipe.yaml"
    sections = {"methods": {"sft": {"command": "sft"}}, "tune": {}, "jobs": jobs}
    whole = recipe(data, study, **sections)
    whole["common"] |= {"max_steps": 80, "save_steps": 10}
    path.write_text(yaml.safe_dump(whole))
    process = command_process("run", str(path))
    while not [*study.glob("*/**/checkpoint-*/trainer_state.json")]:
        assert process.poll() is None
        time.sleep(0.02)
    interrupt(process)
    finished = {name: t for name, t in finished_times(study).items() if name.startswith("models")}
    assert cli("run", config=path, jobs=1) == 0
    assert finished_times(study).items() >= finished.items()
    assert (study / "report.md").is_file()
    records = [json.loads(file.read_text()) for file in (study / "stages").glob("*.json")]
    assert any("continued" in record for record in records)
    assert not (study / "replaced").exists()


def test_rows_that_a_training_would_refuse_late(data, tmp_path) -> None:
    plain = [{"instruction": "a", "output": "b"}]
    without = {**data, "validation": write_rows(tmp_path / "plain.jsonl", plain)}
    only_cot = {"tune": {}, "methods": {"a": {"texts": "cot"}}}
    with pytest.raises(UserError, match=r"students/a/seed-10: texts is cot, and no row of .*plain"):
        planned(without, tmp_path, rationales={}, **only_cot)
    only_cot["methods"]["a"]["eval"] = None
    planned(without, tmp_path, rationales={}, **only_cot)
    with pytest.raises(UserError, match=r"no row of .*data/train.jsonl has a rationale"):
        planned({"source": "dolly"}, tmp_path, **only_cot)
    planned({"source": "arithmetic"}, tmp_path, **only_cot)
    only_crossed = {"tune": {}, "methods": {"a": {"cst": False}}}
    with pytest.raises(UserError, match=r"students/a/seed-10: cst is off, and no row of .*train"):
        planned({"source": "dolly"}, tmp_path, **only_crossed)
    planned({"source": "dolly"}, tmp_path, rationales={}, **only_crossed)
    sampled = {"generate_rows": 1, "generate_data": ["nowhere.jsonl"]}
    with pytest.raises(UserError, match=r"generate_data: no file nowhere\.jsonl"):
        planned(data, tmp_path, students={"student": "small", **sampled})


def test_tuning_needs_validation_rows(data, tmp_path) -> None:
    rows = {name: data[name] for name in ("train", "test")}
    with pytest.raises(UserError, match="'tune' needs validation rows"):
        planned(rows, tmp_path)


def finished_times(study: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (study / "stages").glob("*.json")}


def test_study(data, tmp_path, capsys) -> None:
    study = tmp_path / "study"
    results = run(build(RecipeConfig, recipe(data, study)))
    assert set(results["models"]) == {"teacher", "sft", "uld"}
    scores = results["models"]["uld"]["seeds"]["10"]["scores"]["test"]
    assert scores["standard"]["loss"] > 0
    # The try with the smaller loss on the validation rows was taken.
    tries = [f"tuning/sft/learning_rate-{rate}" for rate in (0.001, 0.1)]
    losses = []
    for name in tries:
        (entry,) = [
            entry
            for line in (study / name / "metrics.jsonl").read_text().splitlines()
            if "eval_ce" in (entry := json.loads(line))
        ]
        losses.append(entry["eval_ce"])
    assert best_try(study, tries) == tries[losses.index(min(losses))]
    taken = yaml.safe_load((study / "students" / "sft" / "seed-10" / "config.yaml").read_text())
    assert taken["learning_rate"] == (0.001, 0.1)[losses.index(min(losses))]
    report = (study / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in report.splitlines()[:5]][2:] == [
        *("teacher", "sft", "uld")
    ]
    with (study / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    (line,) = [
        line
        for line in lines
        if (line["model"], line["prompt"], line["measure"]) == ("uld", "standard", "loss")
    ]
    assert float(line["mean"]) == scores["standard"]["loss"]
    card = (study / "students" / "uld" / "seed-10" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == str(study / "models" / "small")
    assert "kd: uld" in card

    # Again: nothing is left to do. Then a setting of one method: what depends on it is run anew.
    before = finished_times(study)
    run(build(RecipeConfig, recipe(data, study)))
    assert finished_times(study) == before
    for shape, notes in (("llama", 1), ("qwen2", 3)):
        whole = recipe(data, study)
        whole["models"]["large"]["shape"] = shape
        with stage_to_check(RecipeCheck(recipe=whole, settings={})) as (checked, said):
            is_the_study_s = checked.teacher == str(study / "teachers" / "teacher")
            assert (is_the_study_s, len(said)) == (notes == 1, notes)
    changed = recipe(data, study)
    changed["methods"]["uld"]["alpha"] = 0.25
    run(build(RecipeConfig, changed))
    again = {name for name, time_ in finished_times(study).items() if time_ != before[name]}
    assert again == {"students-uld-seed-10.json", "scores-uld-seed-10.json"}
    assert (study / "replaced" / "students-uld-seed-10.1" / "model.safetensors").is_file()
    # Other rows for the test: all evaluations, no training.
    before = finished_times(study)
    other = {**data, "test": write_rows(tmp_path / "other.jsonl", sample_rows(2))}
    run(build(RecipeConfig, changed | {"data": other}))
    again = {name for name, time_ in finished_times(study).items() if time_ != before[name]}
    assert again == {name for name in before if name.startswith("scores-")}


def test_check_before_anything_is_made(data, tmp_path, capsys) -> None:
    """What stages before would make is made aside or stood in for, and said; nothing is written."""
    path, study = tmp_path / "recipe.yaml", tmp_path / "study"
    evaluations = {"generate_rows": 2, "keep_best": "rougeL"}
    source = {"source": data["train"], "train_rows": 6, "validation_rows": 1, "test_rows": 1}
    whole = recipe(source, study, rationales={}, common={"max_prompt_length": 128, **evaluations})
    path.write_text(yaml.safe_dump(whole))
    assert cli("check", config=path, max_length=140, max_new_tokens=8, batch_size=1) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:6] == [
        "stage students/uld/seed-10 (distill)",
        "models/small is not made yet: made in a temporary folder",
        "data is not made yet: made in a temporary folder",
        f"teachers/teacher is not trained yet: {study}/models/large in its place, of its shape",
        "models/large is not made yet: made in a temporary folder",
        f"rationales are not written yet: the rows of {study}/data/train.jsonl as they are",
    ]
    assert "  6 rows, 4 with a rationale" in said
    assert "suggested: batch_size 1, gradient_accumulation 1 (the same rows per step)" in said
    with stage_to_check(RecipeCheck(recipe=whole, settings={"method": "teacher"})) as (checked, _):
        assert Path(checked.train).parent.name == "data"
        assert Path(checked.model, "model.safetensors").is_file()
        assert not checked.student
    assert not Path(checked.model).exists()
    assert not study.exists()
    for settings, error in (
        ({"method": "udl"}, "nothing trains 'udl'; did you mean 'uld'?"),
        ({"processses": "2"}, "unknown option --processses; did you mean 'processes'?"),
        ({"batch_size": "0"}, "setting 'batch_size' must be at least 1, got 0"),
    ):
        assert cli("check", config=path, **settings) == 2
        assert error in capsys.readouterr().err
    # Crossed pairs, in rows that have no rationale yet.
    rows = [{k: v for k, v in row.items() if k != "rationale"} for row in sample_rows(8)]
    source |= {"source": write_rows(tmp_path / "plain.jsonl", rows)}
    crossed = {"data": source, "methods": {"only-crc": {"cst": False}}}
    path.write_text(yaml.safe_dump(whole | crossed))
    assert cli("check", config=path, batch_size=1, dry_run="off") == 0
    assert "  6 rows, 0 with a rationale" in capsys.readouterr().out
    path.write_text(yaml.safe_dump(whole | {"data": {"source": str(tmp_path / "rows.csv")}}))
    assert cli("check", config=path) == 2
    assert capsys.readouterr().err.startswith("error: section 'data': source ")
    (tmp_path / "rows.csv").write_text("instruction,output\n")
    assert cli("check", config=path) == 2
    assert capsys.readouterr().err.startswith("error: stage data: ")


def test_judge(data, tmp_path) -> None:
    study = tmp_path / "study"
    with serve(lambda prompt, _: "Verdict: A") as server:
        judge = {"server": server.url, "model": "tiny", "against": "one"}
        methods = {"one": {"command": "sft"}, "two": {"command": "sft", "max_steps": 1}}
        config = recipe(data, study, teachers={}, tune={}, methods=methods, judge=judge)
        run(build(RecipeConfig, config))
        assert len(server.requests) == 2 * 4
        # A place is no system: each row's two verdicts differ.
        assert "| two    |   0 |   4 |    0 |     one |" in (study / "report.md").read_text()
        run(build(RecipeConfig, config))
        assert len(server.requests) == 2 * 4
    config["judge"]["against"] = "three"
    with pytest.raises(UserError, match=r"expected a method that is run \(one, two\), got three"):
        make_plan(build(RecipeConfig, config))


def test_killed_and_continued_with_two_jobs(data, tmp_path) -> None:
    study = tmp_path / "study"
    path = tmp_path / "recipe.yaml"
    whole = recipe(data, study, tune={}, teachers={}, jobs=2)
    del whole["models"]["large"], whole["methods"]["uld"]
    path.write_text(yaml.safe_dump(whole))
    command = [sys.executable, "-m", "cot2align.train", "run", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while not (study / "stages" / "students-sft-seed-10.yaml").exists():
        assert process.poll() is None
        time.sleep(0.02)
    # Its child goes on alone, and nobody else may work on the study until it has ended.
    process.kill()
    process.wait()
    before = finished_times(study)
    with pytest.raises(UserError, match="another process is at work"):
        run(from_sources(RecipeConfig, str(path), {}))
    while True:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if "another process" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert (study / "report.md").is_file()
    name = "models-small.json"
    assert finished_times(study)[name] == before[name]
    assert not (study / "replaced").exists()


def test_worker(tmp_path) -> None:
    """What a command prints is in its own log; an exit code other than 0 ends the process."""
    with (tmp_path / "start.log").open("w") as file:
        worker = _Worker(subprocess.Popen, file)
    for words, code, printed in (
        (["--help"], 0, "commands:"),
        (["check", "--help"], 0, "--config FILE"),
        (["sft", "--nothing", "1"], 2, "error: unknown option --nothing"),
        (["--help"], 2, ""),
    ):
        log = tmp_path / "stage.log"
        log.write_text("")
        assert worker.run(words, log) == code
        assert printed in log.read_text()
        assert bool(log.read_text()) == bool(printed)


def test_workers_of_a_study(data, tmp_path) -> None:
    """One that died while it waited is not asked again; none waits for work when the study ends."""
    plan = planned(data, tmp_path / "study")
    with (tmp_path / "lock").open("w") as lock:
        runner = _Runner(plan, build(RecipeConfig, recipe(data, tmp_path)), lock.fileno())
        workers = [_Worker(runner._child, lock) for _ in range(3)]
        for worker in workers[:2]:
            runner._give_back(worker)
        workers[1].process.kill()
        workers[1].process.wait()
        assert runner._idle_worker() is workers[0]
        assert runner._idle_worker() is None
        runner._give_back(workers[0])
        with runner._children_end():
            threading.Timer(0.2, runner._give_back, [workers[2]]).start()
        assert [worker.process.returncode for worker in workers] == [0, -signal.SIGKILL, 0]


@pytest.mark.parametrize(
    ("visible", "count", "taken"),
    [
        ("3, 5", 2, ["3", "5", "3"]),
        ("0,1,", 2, ["0", "1", "0"]),
        ("0,-1", 1, [None] * 3),
        ("1", 1, [None] * 3),
        ("", 0, [None] * 3),
    ],
)
def test_workers_share_cores_and_gpus(visible, count, taken, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan = planned(data, tmp_path / "study")
    runner = _Runner(plan, build(RecipeConfig, recipe(data, tmp_path, jobs=3)), 0)
    shares = [runner._share() for _ in range(3)]
    expected = [name or visible for name in taken]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == expected
    assert {share["OMP_NUM_THREADS"] for share in shares} == {str(max(1, os.cpu_count() // 3))}


def test_a_launcher_sets_the_threads_itself(data, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = build(RecipeConfig, recipe(data, tmp_path, launcher="env"))
    with (tmp_path / "lock").open("w") as lock:
        runner = _Runner(planned(data, tmp_path / "study"), config, lock.fileno())
        child = runner._child(["env"], stdout=subprocess.PIPE, text=True)
        assert "OMP_NUM_THREADS" not in child.communicate()[0]


def test_a_failing_stage_of_two_jobs(data, tmp_path) -> None:
    (tmp_path / "rows.csv").write_text("instruction,output\n")
    source = {"source": str(tmp_path / "rows.csv")}
    with pytest.raises(UserError, match=r"stage data: exit code 2: .* \(see .*data\.log\)"):
        run(build(RecipeConfig, recipe(source, tmp_path / "study", jobs=2)))


def test_a_folder_in_use_is_refused(data, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("")
    config = build(RecipeConfig, recipe(data, tmp_path))
    with pytest.raises(UserError, match="is not empty and holds no study"):
        run(config)
    with pytest.raises(UserError, match=r"mine\.txt is a file"):
        run(build(RecipeConfig, recipe(data, tmp_path / "mine.txt")))


RECIPES = sorted(
    path
    for path in ROOT.glob("recipes/*/*.yaml")
    if path.name != "pair.yaml" and path.parent.name != "accelerate"
)


def test_inheritance_is_one_level_deep(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("output: a\nmethods: {x: {kd: uld, alpha: 0.1}}\nseeds: [1]\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nmethods: {x: {alpha: 0.2}, y: {}}\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\n")
    config = from_sources(RecipeConfig, str(tmp_path / "b.yaml"), {})
    assert config.methods == {"x": {"kd": "uld", "alpha": 0.2}, "y": {}}
    assert (config.output, config.seeds) == ("a", [1])
    with pytest.raises(UserError, match=r"b\.yaml has a base of its own"):
        from_sources(RecipeConfig, str(tmp_path / "c.yaml"), {})


def test_a_list_of_recipes(data, tmp_path) -> None:
    """One command runs each, after all are checked; --output is the folder of all."""

    def listed(*names, **others) -> str:
        path = tmp_path / "all.yaml"
        path.write_text(yaml.safe_dump({"recipes": list(names)} | others))
        return str(path)

    small = recipe(data, tmp_path / "first", methods={"sft": {"command": "sft"}}, tune={})
    del small["models"]["large"], small["teachers"]
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(small))
    (tmp_path / "second.yaml").write_text("base: first.yaml\noutput: elsewhere\nseeds: [3, 4]\n")
    both = listed("first.yaml", "second.yaml")
    results = run(from_sources(RecipeConfig, both, {"output": str(tmp_path / "all")}))
    seeds = [list(each["models"]["sft"]["seeds"]) for each in results.values()]
    assert list(results) == [str(tmp_path / "all" / name) for name in ("first", "second")]
    assert seeds == [["10"], ["3", "4"]]
    assert all(Path(folder, "report.md").is_file() for folder in results)

    other = small | {"data": {"source": "nowhere"}}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(other))
    (tmp_path / "inner.yaml").write_text("recipes: [first.yaml]\n")
    for names, others, reason in (
        (["first.yaml", "second.yaml"], {}, "two of its recipes have the output"),
        (["first.yaml", "inner.yaml"], {}, "inner.yaml is a list itself"),
        (["first.yaml"], {"seeds": [1]}, "'seeds' belongs into each"),
        ([], {}, "expected a list of files"),
        (["third.yaml"], {}, r"third\.yaml: No such file"),
    ):
        with pytest.raises(UserError, match=reason):
            from_sources(RecipeConfig, listed(*names, **others), {})
    with pytest.raises(UserError, match="check one of them"):
        from_sources(CheckConfig, listed("first.yaml"), {})
    both = listed("first.yaml", "second.yaml")

    def config_of_both():
        return from_sources(RecipeConfig, both, {"output": str(tmp_path / "none")})

    with pytest.raises(UserError, match="source 'nowhere': no such file, nor a data set"):
        run(config_of_both())
    assert not (tmp_path / "none").exists()
    (tmp_path / "second.yaml").write_text("base: first.yaml\n")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "second").write_text("")
    with pytest.raises(UserError, match="none/second is a file, expected a folder"):
        run(config_of_both())
    assert not (tmp_path / "none" / "first").exists()


# What stands in for the models of the paper: the same architecture, the same kind of tokenizer.
STAND_INS = {
    "openai-community/gpt2": ("gpt2", "bpe", 380),
    "openai-community/gpt2-xl": ("gpt2", "bpe", 380),
    "Qwen/Qwen1.5-1.8B": ("qwen2", "bpe", 420),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", "bpe", 420),
    "mistralai/Mistral-7B-v0.1": ("mistral", "spm", 420),
    "meta-llama/Llama-2-7b-hf": ("llama", "spm", 400),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": ("llama", "spm", 400),
}


@pytest.fixture(scope="module")
def stand_ins(data, tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models, by the name of the model that they stand for."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"width": 16, "heads": 2, "layers": 1, "max_length": 256}
    for i, (shape, tokenizer, pieces) in enumerate(STAND_INS.values()):
        settings = {"shape": shape, "tokenizer": tokenizer, "pieces": pieces, "data": data["train"]}
        new_model.run(build(NewModelConfig, settings | sizes | {"output": str(folder / str(i))}))
    return {name: str(folder / str(i)) for i, name in enumerate(STAND_INS)}


# In an order in which each comes in a recipe that has it.
METHODS = [
    *("sft", "uld", "mined", "dskd", "kl", "kl+cot2align", "uld+cot2align", "mined+cot2align"),
    *("dskd+cot2align", "dskd+cot2align-authors", "only-cst", "only-crc", "only-last"),
]


def test_the_recipes_cover_all_methods() -> None:
    chosen = set()
    for number, path in enumerate(RECIPES):
        methods = from_sources(RecipeConfig, str(path), {}).methods
        chosen.add(sorted(methods, key=METHODS.index)[number % len(methods)])
    assert chosen == set(METHODS)


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_small_recipes(path, tmp_path, monkeypatch) -> None:
    config = from_sources(RecipeConfig, str(path), {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "dolly").mkdir(parents=True)
    (tmp_path / "rows.jsonl").touch()
    for each in getattr(config, "recipes", [config]):
        stages = make_plan(each).stages
        assert {"models/new-student", "models/new-teacher", "rationales"} < {s.name for s in stages}


@pytest.mark.parametrize(
    ("number", "path"),
    [*enumerate(RECIPES)],
    ids=[f"{path.parent.name}-{path.stem}" for path in RECIPES],
)
def test_recipes_of_the_paper(number, path, data, stand_ins, tmp_path, monkeypatch) -> None:
    config = from_sources(RecipeConfig, str(path), {})
    monkeypatch.chdir(tmp_path)
    for name in config.evaluate.get("on", ()):
        (tmp_path / "data" / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            write_rows(tmp_path / "data" / name / f"{split}.jsonl", sample_rows(2))
    config.only, only = [], config.only
    stages = make_plan(config).stages  # every setting of every method
    if "on" in config.evaluate:  # the split that is tested on is the one that is trained on
        assert stages[0].settings["train"] == "data/dolly/train.jsonl"
    assert {s.name for s in stages} > {f"students/{m}/seed-10" for m in config.methods}
    assert set(only) <= set(config.methods)
    # One method of each recipe, all of them over the recipes, with two steps of a training.
    config.only = [sorted(config.methods, key=METHODS.index)[number % len(config.methods)]]
    config.output = str(tmp_path / "study")
    config.device = "cpu"
    config.data = data
    config.common |= {"max_length": 256, "max_new_tokens": 4, "max_prompt_length": 160}
    config.common |= {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 2}
    for teacher in config.teachers.values():
        teacher["model"] = stand_ins[teacher["model"]]
    config.students["student"] = stand_ins[config.students["student"]]
    config.rationales["batch_size"] = 8
    config.evaluate = {"seeds": [10], "batch_size": 4}
    results = run(config)
    (trained,) = results["models"][config.only[0]]["seeds"].values()
    assert trained["scores"]["test"]["standard"]["loss"] > 0
