"""The anchor worker with a chain that behaves: what it anchors, when, and at which fees."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from anchor_cases import EAGER, AnchorCase, register_log, serve_requests
from anvil_chain import SUBMITTER, Anvil, anvil, deploy_contracts
from hypothesis import given
from hypothesis import strategies as st

from openlora.attribution.chain_check import ChainCheck, anchored_head
from openlora.attribution.checkpoint import verify_checkpoint
from openlora.attribution.custody import Custody, settle_custody
from openlora.attribution.log import ReceiptLog
from openlora.errors import Internal, LogConflict, ReceiptInvalid, Unavailable
from openlora.network.anchor.fees import GWEI, FeePolicy, Fees, check_replacement
from openlora.network.anchor.outbox import FINAL
from openlora.network.anchor.worker import AnchorPolicy, Phase
from openlora.network.deployment import Deployment

WEI = st.integers(0, 10**13)


@pytest.fixture(scope="module")
def chain() -> Iterator[Anvil]:
    with anvil() as one:
        yield one


@pytest.fixture(scope="module")
def deployment(chain: Anvil, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return deploy_contracts(chain, tmp_path_factory.mktemp("chain") / "deployment.json")


@pytest.fixture
def case(chain: Anvil, deployment: Deployment, tmp_path: Path) -> AnchorCase:
    state = tmp_path / "state"
    ReceiptLog.open(state).close()
    register_log(chain, deployment, state)
    return AnchorCase(chain, deployment, state)


def test_a_checkpoint_is_anchored_once(case: AnchorCase) -> None:
    assert case.step().message == "everything that is signed is anchored"
    case.serve(5)
    assert case.step().phase is Phase.SENT
    report = case.step()
    assert (report.phase, report.head_size, report.final_size) == (Phase.IDLE, 5, 5)
    case.serve(3)
    assert [case.step().phase for _ in range(3)] == [Phase.SENT, Phase.IDLE, Phase.IDLE]
    case.check_history(8)
    assert [(row.anchor.previous_size, row.anchor.size, row.state) for row in case.rows()] == [
        (0, 5, FINAL),
        (5, 8, FINAL),
    ]
    assert ChainCheck.load(case.state).verdict == "consistent"


def test_only_what_is_signed_is_anchored(case: AnchorCase) -> None:
    case.serve(4)
    note = (case.state / "log" / "checkpoint").read_bytes()
    case.serve(4)
    (case.state / "log" / "checkpoint").write_bytes(note)
    case.step()
    assert case.step().message == "everything that is signed is anchored"
    case.check_history(4)


def test_a_forged_checkpoint_is_not_anchored(case: AnchorCase, tmp_path: Path) -> None:
    serve_requests(tmp_path / "other", 0, 4)
    case.serve(4)
    for forged in (
        (tmp_path / "other" / "log" / "checkpoint").read_bytes(),
        (case.state / "log" / "checkpoint").read_bytes().replace(b"\n4\n", b"\n3\n"),
    ):
        (case.state / "log" / "checkpoint").write_bytes(forged)
        with pytest.raises(ReceiptInvalid):
            case.step()
    assert case.head_size() == 0


def test_a_signed_checkpoint_of_other_leaves_is_not_anchored(case: AnchorCase) -> None:
    case.serve(4)
    with sqlite3.connect(case.state / "log" / "receipts.sqlite") as file:
        file.execute("UPDATE receipts SET leaf = (SELECT leaf FROM receipts WHERE seq = 0) WHERE seq = 2")
    with pytest.raises(LogConflict, match="signed checkpoint of 4"):
        case.step()
    assert case.head_size() == 0


def test_anchors_wait_for_their_time_or_their_number(case: AnchorCase) -> None:
    case.policy = AnchorPolicy(every_seconds=600, min_receipts=50)
    case.restart()
    case.serve(1)
    assert case.step().phase is Phase.SENT  # the first one at once
    case.serve(49)
    assert case.step(10).message == "49 receipts wait for the next anchor"
    case.serve(1)
    assert case.step(10).phase is Phase.SENT
    case.serve(1)
    assert case.step(570).phase is Phase.IDLE
    assert case.step(30).phase is Phase.SENT
    case.serve(1)
    assert case.step(-10_000).phase is Phase.SENT  # a clock that was set back must not stop it
    case.check_history(53)


def test_a_restored_log_is_behind_and_never_anchored_over(case: AnchorCase, tmp_path: Path) -> None:
    case.serve(4)
    backup = shutil.copytree(case.state, tmp_path / "backup")
    case.serve(4)
    case.step()
    assert case.step().final_size == 8
    restored = AnchorCase(case.chain, case.deployment, backup)
    with pytest.raises(LogConflict, match="8 receipts are anchored, this log has 4"):
        restored.step()
    check = ChainCheck.load(backup)
    assert (check.verdict, check.head_size, check.log_size, check.log_id) == ("behind", 8, 4, case.key.log_id.hex())
    assert anchored_head(backup)(case.key).size == 8
    assert restored.rows() == []


def test_what_the_chain_says_of_a_copy_counts_from_its_own_comparison_on(case: AnchorCase, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="not compared with the chain"):
        anchored_head(case.state)(case.key)
    case.step()
    assert anchored_head(case.state)(case.key) is None
    case.serve(4)
    case.step()
    case.step()
    copy = shutil.copytree(case.state, tmp_path / "copy")
    assert anchored_head(case.state)(case.key) == case.log.checkpoint
    with pytest.raises(Unavailable, match="not compared with the chain"):
        anchored_head(copy)(case.key)
    AnchorCase(case.chain, case.deployment, copy).step()
    assert anchored_head(copy)(case.key) == case.log.checkpoint


def test_a_copied_log_that_went_another_way_is_forked(case: AnchorCase, tmp_path: Path) -> None:
    case.serve(4)
    copy = shutil.copytree(case.state, tmp_path / "copy")
    case.serve(4)
    case.step()
    case.step()
    with ReceiptLog.open(copy) as log:
        log.take_custody()  # as an operator would who doesn't know better
    forked = AnchorCase(case.chain, case.deployment, copy)
    forked.requests = 100
    forked.serve(9)
    with pytest.raises(LogConflict, match="its history is another one"):
        forked.step()
    assert ChainCheck.load(copy).verdict == "forked"
    case.check_history(8)


def test_a_log_restored_under_a_running_worker_is_noticed(case: AnchorCase, tmp_path: Path) -> None:
    case.serve(4)
    backup = shutil.copytree(case.state / "log", tmp_path / "backup")
    case.serve(4)
    case.step()
    case.step()
    shutil.rmtree(case.state / "log")
    shutil.copytree(backup, case.state / "log")
    with pytest.raises(LogConflict, match="this log has 4"):
        case.step()


@pytest.mark.parametrize("verdict", ["behind", "forked"])
def test_a_log_that_the_chain_contradicts_is_closed_at_the_next_start(case: AnchorCase, verdict: str) -> None:
    """Restored in place, so that its file looks like the one that signed."""
    case.serve(4)
    places = (case.state / "log", case.state / "journal")
    backup = {file: file.read_bytes() for place in places for file in place.iterdir() if file.is_file()}
    case.serve(4)
    case.step()
    case.step()
    for file in [file for place in places for file in place.iterdir() if file not in backup]:
        file.unlink()
    for file, content in backup.items():
        file.write_bytes(content)
    if verdict == "forked":
        case.requests = 100
        case.serve(9)
    case.restart()
    with pytest.raises(LogConflict, match="start the server again"):
        case.step()
    assert ChainCheck.load(case.state).verdict == verdict
    key = case.key
    assert settle_custody(case.state, [anchored_head(case.state)]) is Custody.CLOSED
    closed = case.state / "closed" / key.log_id.hex()[:16]
    assert verify_checkpoint((closed / "log" / "checkpoint").read_bytes(), key).size == (
        13 if verdict == "forked" else 4
    )
    with ReceiptLog.open(case.state) as log:
        assert log.key.predecessor == key.log_id
    assert settle_custody(case.state, [anchored_head(case.state)]) is Custody.KEPT


@given(WEI, WEI, WEI, WEI)
def test_a_replacement_pays_enough_more_for_every_pool(max_fee: int, tip: int, base_fee: int, suggested: int) -> None:
    policy, old = FeePolicy(cap=10**14), Fees(max(max_fee, tip), tip)
    new = policy.replacement(old, base_fee, suggested)
    check_replacement(old, new)
    assert 8 * new.max_fee >= 9 * old.max_fee and 8 * new.tip >= 9 * old.tip
    assert new.tip <= new.max_fee <= policy.cap and new.max_fee >= base_fee


@given(WEI, WEI, st.integers(1, 10**12))
def test_no_fee_is_over_the_cap(base_fee: int, suggested: int, cap: int) -> None:
    policy = FeePolicy(cap=cap)
    quote = policy.quote(base_fee, suggested)
    assert (quote is None) == (base_fee >= cap)
    assert quote is None or (0 < quote.tip <= quote.max_fee <= cap and quote.max_fee > base_fee)
    assert policy.replacement(Fees(cap, 1), base_fee, suggested) is None


def test_too_cheap_a_replacement_is_refused_before_it_is_kept(case: AnchorCase) -> None:
    case.chain.hold()
    try:
        case.serve(1)
        case.step()
        (row,) = case.rows()
        for max_fee, tip in ((1.09, 2), (2, 1.09), (1, 1)):
            cheap = replace(
                row.anchor, hash=bytes(32), max_fee=int(row.anchor.max_fee * max_fee), tip=int(row.anchor.tip * tip)
            )
            with pytest.raises(Internal, match="10 %"):
                case.outbox.add(case.worker.scope, cheap)
        assert case.rows() == [row]
    finally:
        case.chain.release()


def test_the_outbox_is_private_and_synced(case: AnchorCase) -> None:
    path = case.state / "settle" / "outbox.sqlite"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    pragmas = [
        case.outbox._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
    ]
    assert pragmas == ["wal", 2]


def test_the_fee_cap_is_the_operators(case: AnchorCase) -> None:
    case.policy = replace(EAGER, fees=FeePolicy(cap=GWEI // 1000))
    case.restart()
    case.serve(1)
    report = case.step()
    assert report.phase is Phase.BLOCKED and "cap of 1000000 wei" in report.message
    assert case.rows() == [] and case.account == SUBMITTER


def test_a_copy_may_sign_only_what_continues_the_chain(case: AnchorCase, tmp_path: Path) -> None:
    case.serve(4)
    older = shutil.copytree(case.state, tmp_path / "older")
    case.serve(4)
    case.step()
    case.step()
    whole = shutil.copytree(case.state, tmp_path / "whole")
    for copy in (older, whole):
        assert settle_custody(copy, [anchored_head(copy)]) is Custody.UNCOMPARED
    with pytest.raises(LogConflict):
        AnchorCase(case.chain, case.deployment, older).step()
    AnchorCase(case.chain, case.deployment, whole).step()
    assert settle_custody(older, [anchored_head(older)]) is Custody.CLOSED
    assert settle_custody(whole, [anchored_head(whole)]) is Custody.TAKEN
