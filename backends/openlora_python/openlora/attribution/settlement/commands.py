"""`openlora settle …`: compute an epoch, propose it, attest it, accept it, claim from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from eth_utils import to_canonical_address, to_checksum_address

from ...command_group import command_group
from ...errors import InvalidArgument
from ...network.arguments import DeploymentFile, parse_address, parse_hash
from .attestation import Attestation, ascending, attest, proposal_document
from .books import keep_prefixes
from .chain_state import ChainState, Proposal, read_state
from .epoch import check_proposal, next_epoch, replacement_epoch, stops_of
from .facts import ChainFacts
from .printing import print_claims, print_epoch, print_sent, print_status
from .session import ChainSession, judged, open_exports, open_settling, prefix_store, referenced_blocks

MOST = 2**120 - 1
"""What the distributor can pay in all; the cap where a chain's own is not asked."""

settle_app = command_group("Settlement: from receipts and chain to rewards.")

Exports = Annotated[list[Path], typer.Option("--export", metavar="DIR", help="The export of a log; once for each.")]
StateDir = Annotated[Path, typer.Option(help="Keeps what was read and checked before, below settle/.")]
FromScratch = Annotated[bool, typer.Option("--from-scratch", help="Check every receipt again, from the first one on.")]
Key = Annotated[Path, typer.Option("--key", metavar="FILE", help="The key file that pays for the transaction.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the result.")]


@settle_app.command("epoch")
def epoch(
    exports: Exports,
    deployment: DeploymentFile = None,
    facts_file: Annotated[Path | None, typer.Option("--facts", help="Chain facts from a file, instead of RPC.")] = None,
    epoch_cap: Annotated[int | None, typer.Option(min=1, help="Instead of the distributor's own.")] = None,
    state_dir: StateDir = Path("var"),
    from_scratch: FromScratch = False,
    as_json: Json = False,
) -> None:
    """Compute what would be proposed now. Sends nothing."""
    logs = open_exports(exports)
    if facts_file is not None:
        books = judged(logs, _read_facts(facts_file), None)
        computed = next_epoch(books, epoch_cap or MOST)
    else:
        session = ChainSession.open(deployment, state_dir)
        store = prefix_store(state_dir)
        books = session.books(logs, None if from_scratch else store)
        computed = next_epoch(books, epoch_cap or session.contracts.distributor.epoch_cap())
        keep_prefixes(books, logs, store)
    print_epoch(books, computed, as_json)


@settle_app.command("propose")
def propose(
    exports: Exports,
    key: Key,
    deployment: DeploymentFile = None,
    state_dir: StateDir = Path("var"),
    from_scratch: FromScratch = False,
    replace_root: Annotated[bool, typer.Option("--replace-root", help="Settle nothing, mend a wrong root.")] = False,
    as_json: Json = False,
) -> None:
    """Compute the next epoch and propose it. The key must be a publisher's."""
    at = open_settling(exports, key, deployment, state_dir, from_scratch)
    pending, distributor = at.books.state.pending, at.session.contracts.distributor
    if pending is not None:
        raise InvalidArgument(f"epoch {pending.epoch} is pending: it is accepted or vetoed first")
    computed = replacement_epoch(at.books) if replace_root else next_epoch(at.books, distributor.epoch_cap())
    if computed.proposal is None:
        raise InvalidArgument("; ".join(("there is nothing to settle", *at.books.notes, *computed.notes)))
    at.keep(computed.stops)
    new = computed.proposal
    receipt = at.session.send(at.account, distributor.propose(new.root, new.total, new.allocations))
    print_epoch(at.books, computed, as_json, receipt["transactionHash"].to_0x_hex())


@settle_app.command("attest")
def attest_epoch(
    exports: Exports,
    key: Key,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the attestation goes.")],
    deployment: DeploymentFile = None,
    state_dir: StateDir = Path("var"),
    from_scratch: FromScratch = False,
    as_json: Json = False,
) -> None:
    """Compute the pending epoch again, from your own exports and chain, and sign it if it is right. Sends nothing."""
    at = open_settling(exports, key, deployment, state_dir, from_scratch)
    pending, facts = _pending(at.books.state), at.session.facts
    check_proposal(at.books, pending)
    at.keep(stops_of(pending))
    signed = attest(at.account, facts.chain_id, facts.distributor, pending)
    out.write_text(signed.to_json())
    result = {"epoch": pending.epoch, "signer": signed.signer, "file": str(out), **proposal_document(pending)}
    print_sent(f"epoch {pending.epoch} is right: attested by {signed.signer} in {out}", result, as_json)


@settle_app.command("accept")
def accept(
    files: Annotated[list[Path], typer.Argument(metavar="ATTESTATION…", help="Files of `openlora settle attest`.")],
    key: Key,
    deployment: DeploymentFile = None,
    state_dir: StateDir = Path("var"),
    as_json: Json = False,
) -> None:
    """Accept the pending epoch with its attestations, once its delay is over. Anybody may."""
    attestations = [Attestation.from_json(_read(path)) for path in files]
    session = ChainSession.open(deployment, state_dir)
    account = session.account(key)
    pending = _pending(read_state(session.facts))
    here = (session.facts.chain_id, session.facts.distributor, pending)
    for path, one in zip(files, attestations, strict=True):
        if (one.chain_id, one.distributor, one.proposal) != here:
            raise InvalidArgument(f"is not for the pending epoch {pending.epoch}", field=str(path))
    signatures = [one.signature for one in ascending(attestations)]
    call = session.contracts.distributor.accept(
        pending.epoch, pending.root, pending.total, pending.allocations, signatures
    )
    receipt = session.send(account, call)
    result = {"epoch": pending.epoch, "transaction": receipt["transactionHash"].to_0x_hex()}
    print_sent(f"epoch {pending.epoch} is accepted: {pending.total} paid out in all", result, as_json)


@settle_app.command("veto")
def veto(key: Key, deployment: DeploymentFile = None, state_dir: StateDir = Path("var"), as_json: Json = False) -> None:
    """Drop the pending epoch. The key must be a guardian's."""
    session = ChainSession.open(deployment, state_dir)
    receipt = session.send(session.account(key), session.contracts.distributor.veto())
    result = {"transaction": receipt["transactionHash"].to_0x_hex()}
    print_sent("the pending epoch is vetoed", result, as_json)


@settle_app.command("pause")
def pause(
    key: Key, deployment: DeploymentFile = None, state_dir: StateDir = Path("var"), as_json: Json = False
) -> None:
    """Stop propose, accept and claim, until the admin unpauses. The key must be a guardian's."""
    session = ChainSession.open(deployment, state_dir)
    receipt = session.send(session.account(key), session.contracts.distributor.pause())
    print_sent("paused", {"transaction": receipt["transactionHash"].to_0x_hex()}, as_json)


@settle_app.command("unpause")
def unpause(
    key: Key, deployment: DeploymentFile = None, state_dir: StateDir = Path("var"), as_json: Json = False
) -> None:
    """Go on after a pause. The key must be the admin's."""
    session = ChainSession.open(deployment, state_dir)
    receipt = session.send(session.account(key), session.contracts.distributor.unpause())
    print_sent("settlement goes on", {"transaction": receipt["transactionHash"].to_0x_hex()}, as_json)


@settle_app.command("claim")
def claim(
    exports: Exports,
    key: Key,
    accounts: Annotated[list[str] | None, typer.Argument(metavar="[ACCOUNT…]", help="Whose rewards.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Those of all who have some.")] = False,
    deployment: DeploymentFile = None,
    state_dir: StateDir = Path("var"),
    from_scratch: FromScratch = False,
    as_json: Json = False,
) -> None:
    """Have rewards paid out to whom they belong. Anybody may send it."""
    if bool(accounts) == every:
        raise InvalidArgument("give accounts, or --all", field="ACCOUNT")
    at = open_settling(exports, key, deployment, state_dir, from_scratch)
    tree, amounts = at.books.accepted_tree()
    at.keep()
    distributor, paid = at.session.contracts.distributor, []
    named = [to_canonical_address(parse_address(one, "ACCOUNT")) for one in accounts or ()]
    for earner in sorted(amounts) if every else named:
        who = to_checksum_address(earner)
        proof, claimed = tree.proof(earner), distributor.claimed_of(who)
        if every and claimed >= amounts[earner]:
            continue
        at.session.send(at.account, distributor.claim(who, amounts[earner], proof))
        paid.append({"account": who, "amount": str(amounts[earner] - claimed), "cumulative": str(amounts[earner])})
    print_claims(paid, as_json)


@settle_app.command("status")
def status(
    deployment: DeploymentFile = None,
    exports: Annotated[
        list[Path] | None, typer.Option("--export", metavar="DIR", help="With the earners, from all logs' exports.")
    ] = None,
    state_dir: StateDir = Path("var"),
    as_json: Json = False,
) -> None:
    """Deposits, anchored and settled sizes, and the pending proposal."""
    session = ChainSession.open(deployment, state_dir)
    amounts = None
    if exports:
        _, amounts = session.books(open_exports(exports), prefix_store(state_dir)).reward_tree()
    print_status(session, read_state(session.facts), amounts, as_json)


@settle_app.command("deposit")
def deposit(
    log_id: Annotated[str, typer.Argument(metavar="LOG", help="The log's id, 64 hex digits.")],
    amount: Annotated[int, typer.Argument(min=1, help="In the smallest unit of the token.")],
    key: Key,
    deployment: DeploymentFile = None,
    state_dir: StateDir = Path("var"),
    as_json: Json = False,
) -> None:
    """Deposit for a log, from the key's account: what its receipts are paid from. There is no way back."""
    log = parse_hash(log_id, "LOG")
    session = ChainSession.open(deployment, state_dir)
    account = session.account(key)
    contracts = session.contracts
    session.send(account, contracts.token.approve(contracts.distributor.address, amount))
    receipt = session.send(account, contracts.distributor.deposit(log, amount))
    result = {"log_id": log_id, "amount": str(amount), "transaction": receipt["transactionHash"].to_0x_hex()}
    print_sent(f"deposited {amount} for log {log.hex()}", result, as_json)


@settle_app.command("facts")
def facts(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where they go.")],
    deployment: DeploymentFile = None,
    exports: Annotated[
        list[Path] | None, typer.Option("--export", metavar="DIR", help="With the blocks that its receipts name.")
    ] = None,
    state_dir: StateDir = Path("var"),
    as_json: Json = False,
) -> None:
    """Write down what the chain says, so that anybody can compute everything again offline."""
    session = ChainSession.open(deployment, state_dir)
    numbers = set().union(*(referenced_blocks(one) for one in open_exports(exports or ())))
    found = [session.header(number) for number in sorted(numbers) if number <= session.facts.head]
    whole = session.facts.with_headers(found)
    out.write_text(whole.to_json())
    result = {"file": str(out), "head": whole.head, "events": len(whole.events), "headers": len(whole.headers)}
    print_sent(f"{len(whole.events)} events up to block {whole.head} are in {out}", result, as_json)


def _pending(state: ChainState) -> Proposal:
    if state.pending is None:
        raise InvalidArgument("no proposal is pending in the final blocks")
    return state.pending


def _read_facts(path: Path) -> ChainFacts:
    return ChainFacts.from_json(_read(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"can't read {path}: {error.strerror}") from error
