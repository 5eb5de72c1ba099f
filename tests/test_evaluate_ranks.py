"""`tnl evaluate` under torchrun, which kills the other ranks where one ends with an error."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
import torch

from tests.tiny_folder import tiny_folder
from tests.warm_process import CONTEXT
from tnl.errors import CannotWriteError, UserError
from tnl.evaluation import suite_report
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.suite_command import SuiteOptions, evaluate_suite

CASES = ("slow", "full")


def rank_main(rank: int, folder: Path, ports: list[int]) -> None:
    """Write how this rank's evaluations ended, and whether the report was there."""
    torch.set_num_threads(1)
    write = suite_report.write_report

    def write_slowly(report, output):
        time.sleep(1)
        write(report, output)

    def write_nothing(report, output):
        raise CannotWriteError(f"{output}: no space")

    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    HarnessModel.generate_until = lambda self, requests, **_: ["", "self"] * (len(requests) // 2)
    found = {}
    for case, port, writer in zip(CASES, ports, (write_slowly, write_nothing), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        suite_report.write_report = writer
        try:
            options = SuiteOptions(None, ("tnl_repeat", "tnl_copy"), folder / case, limit=4)
            evaluate_suite(str(folder / "model"), options, report=lambda text: None)
        except UserError as error:
            found[case] = str(error), (folder / case / suite_report.PAGE).is_file()
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        arguments = (folder, [_free_port() for _ in CASES])
        start = CONTEXT.get_start_method()
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=2, start_method=start)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_rank_ends_before_the_report_is_written(found):
    for rank in found:
        message, is_written = rank["slow"]
        assert "tnl_repeat: the answers to 2 of 4 documents are empty (doc_id 0, 2)" in message
        assert is_written


def test_all_ranks_end_with_the_error_of_the_one_that_writes(found):
    assert [rank["full"][0].endswith("no space") for rank in found] == [True, True]
