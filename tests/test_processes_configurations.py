"""How stages are launched: accelerate reads the configurations as they are meant; mistakes are one line."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.lm.schedule import Schedule
from tasks.stage import Compute, ParamsError, UserError
from tasks.stage.launch import CONFIGURATIONS, configuration, launch_arguments
from tasks.stage.place import Place

KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
SECTIONS = {"fsdp_config": "", "deepspeed_config": ""}


def compute(**changes: Any) -> Compute:
    values = {"device": "auto", "precision": "auto", "threads": 1, "processes": 4, "accelerate": None}
    return Compute.model_validate(values | changes)


def launched(name: str, **changes: Any) -> Namespace:
    """What `accelerate launch` makes of its arguments and the configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments, _ = launch_arguments("tasks.base", compute(accelerate=name, **changes))
    found, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert isinstance(found, Namespace)
    return found


def test_every_configuration_has_a_test() -> None:
    assert {path.stem for path in CONFIGURATIONS.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_opens_it_and_knows_every_key(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = configuration(name)
    assert load_config_from_file(str(file)).distributed_type == KINDS[name]
    written = yaml.safe_load(file.read_text())
    known = vars(launch_command_parser().parse_args(["script"]))
    assert {key for section in SECTIONS for key in written.get(section, {})} <= set(known)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_what_is_launched(name: str) -> None:
    found = launched(name)
    assert (found.num_processes, found.num_machines, found.num_cpu_threads_per_process) == (4, 1, 1)
    assert (found.module, found.training_script) == (True, "tasks.base")
    assert (found.multi_gpu, found.use_fsdp, found.use_deepspeed) == (name == "ddp", name == "fsdp2", False)


def test_fsdp2_reaches_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import prepare_multi_gpu_env

    for key, value in prepare_multi_gpu_env(launched("fsdp2")).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_reaches_the_processes(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import prepare_deepspeed_cmd_env

    monkeypatch.setattr("tasks.stage.launch._check", lambda *_: None)  # deepspeed is not installed here
    found = launched(f"zero{stage}")
    found.deepspeed_fields_from_accelerate_config = ""
    assert (found.use_deepspeed, found.use_fsdp) == (True, False)
    _, environment = prepare_deepspeed_cmd_env(found)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    saves_whole = environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL")
    assert saves_whole == ("true" if stage == 3 else None)


def test_a_machine_among_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "two.yaml"
    several = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    file.write_text(yaml.safe_dump(yaml.safe_load(configuration("ddp").read_text()) | several))
    assert launched(str(file)).machine_rank == 0
    monkeypatch.setenv("LIFECYCLE_MACHINE_RANK", "1")
    found = launched(str(file))
    assert (found.machine_rank, found.num_machines, found.main_process_port) == (1, 2, 29500)
    with pytest.raises(ParamsError, match=r"compute.processes: 3 cannot be shared evenly by 2 machines"):
        launched(str(file), processes=3)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ParamsError, match=r"no configuration zero; name ddp, fsdp2, zero2, zero3, or the path"):
        launch_arguments("tasks.base", compute(accelerate="zero"))
    with pytest.raises(
        UserError, match=r"compute.accelerate is zero2, which needs deepspeed: pip install deepspeed"
    ):
        launch_arguments("tasks.base", compute(accelerate="zero2"))


def test_a_batch_that_cannot_be_shared_is_told() -> None:
    schedule = Schedule.model_validate(
        {
            "epochs": 1, "batch_size": 8, "micro_batch_size": None, "warmup": 0, "weight_decay": 0, "clip": 1,
            "evaluations": 1, "log_every": 1, "checkpoint_every": 1,
        }
    )  # fmt: skip
    assert [schedule.rows_on_each(count) for count in (1, 2, 4)] == [8, 4, 2]
    with pytest.raises(ParamsError, match=r"batch_size 8 cannot be shared evenly by compute.processes, 3"):
        schedule.rows_on_each(3)
    halved = schedule.model_copy(update={"micro_batch_size": 4})
    assert [halved.rows_on_each(count) for count in (1, 2)] == [4, 4]
    with pytest.raises(ParamsError, match=r"in parts of micro_batch_size, 4"):
        halved.rows_on_each(4)


def test_shares_are_the_whole() -> None:
    for count in (3, 8, 9):
        shares = [Place(rank, 4).part(list(range(count))) for rank in range(4)]
        assert [each for share in shares for each in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
