"""Who may use which adapter: cards, the operator, token gates, signed requests. Whatever is not known is a no."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from access_cases import CARD, SetClock, adapter, make_run, write_log_key
from coincurve import PrivateKey
from eth_account import Account
from eth_account.messages import encode_defunct
from live_server import key_digest

from openlora.access_rule import AccessRule, TokenTerms
from openlora.attribution.card import parse_card
from openlora.config import UsageLimits
from openlora.errors import InvalidArgument, Unavailable
from openlora.serving.access.caller_store import CallerStore
from openlora.serving.access.checks import Holding
from openlora.serving.access.policy import ANONYMOUS, AccessPolicy
from openlora.serving.access.signed_login import MAX_LIFETIME_SECONDS, login_message
from openlora_client import login_token, signed_token

# eth_account brings py_ecc, which raises this to 100,000: deep JSON would end the test process instead of raising.
sys.setrecursionlimit(1_000)

WALLET = Account.from_key("0x" + "11" * 32)
OTHER = Account.from_key("0x" + "22" * 32)
TOKEN = {"chain_id": 1, "contract": "0x" + "ab" * 20, "minimum": 5}
GATED = {"policy": "token-gated", "token": TOKEN}
CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


class Chain:
    """A view whose holdings a test writes down."""

    def __init__(self) -> None:
        self.holdings: dict[str, Holding] = {}
        self.fault: Exception | None = None

    def holding(self, token: TokenTerms, address: str) -> Holding | None:
        if self.fault is not None:
            raise self.fault
        assert token == TokenTerms(**TOKEN)
        return self.holdings.get(address)


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_policies_of_cards(tmp_path: Path) -> None:
    policy = AccessPolicy(make_run(tmp_path))
    listed = adapter("a", {"policy": "allow-list", "callers": ["alice", WALLET.address.lower()]})
    assert policy.allows(ANONYMOUS, adapter("a"))
    assert policy.allows(ANONYMOUS, adapter("a", {"policy": "open"}))
    assert policy.allows(ANONYMOUS, replace(adapter("a"), card=None))
    assert policy.allows("alice", listed)
    assert policy.allows(WALLET.address, listed)
    assert not policy.allows(ANONYMOUS, listed)
    assert not policy.allows("Alice", listed)
    assert not policy.allows("alice", adapter("a", {"policy": "allow-list"}))


def test_a_card_that_changes_is_read_again(tmp_path: Path) -> None:
    policy, record = AccessPolicy(make_run(tmp_path)), adapter("a", {"policy": "allow-list", "callers": ["alice"]})
    assert (policy.allows("alice", record), policy.allows("bob", record)) == (True, False)
    for access, expected in [
        ({"policy": "allow-list", "callers": ["bob"]}, (False, True)),
        ({"policy": "allow-list", "callers": "bob"}, (False, False)),
        ({"policy": "open"}, (True, True)),
    ]:
        changed = replace(record, card={**CARD, "access": access})
        assert (policy.allows("alice", changed), policy.allows("bob", changed)) == expected
        assert (policy.allows("alice", changed), policy.allows("bob", changed)) == expected


@pytest.mark.parametrize(
    "access",
    [
        {},
        {"policy": "Open"},
        {"policy": "open", "callers": ["alice"]},
        {"policy": "open", "until": 5},
        {"policy": "allow-list", "callers": "alice"},
        {"policy": "allow-list", "callers": [""]},
        {"policy": "allow-list", "callers": ["alice"], "token": TOKEN},
        {"policy": "token-gated"},
        {"policy": "token-gated", "token": {**TOKEN, "minimum": 0}},
        {"policy": "token-gated", "token": {**TOKEN, "contract": "0x12"}},
        {"policy": "token-gated", "token": {**TOKEN, "chain_id": "1"}},
        "open",
        ["open"],
        False,
    ],
)
def test_a_rule_that_makes_no_sense_denies_and_no_card_with_one_is_taken(tmp_path: Path, access: object) -> None:
    run = make_run(tmp_path)
    assert not AccessPolicy(run).allows("alice", replace(adapter("a"), card={**CARD, "access": access}))
    with pytest.raises(InvalidArgument, match="card.access"):
        parse_card({**CARD, "access": access})


def test_a_card_with_a_rule_is_a_card() -> None:
    for access in ({"policy": "open"}, {"policy": "allow-list", "callers": ["alice"]}, GATED):
        assert parse_card({**CARD, "access": access}).access == AccessRule.model_validate(access)
    assert parse_card(CARD).access is None


def test_the_operators_word_wins(tmp_path: Path) -> None:
    closed, opened = {"policy": "allow-list"}, {"policy": "open"}
    run = make_run(
        tmp_path,
        adapters={"a": {"access": opened}, "b": {"access": closed}, "c": {"tokens_per_day": 5}},
        private={"d": ["alice"]},
    )
    policy = AccessPolicy(run)
    assert policy.allows(ANONYMOUS, adapter("a", closed))
    assert not policy.allows(ANONYMOUS, adapter("b", opened))
    assert not policy.allows(ANONYMOUS, adapter("c", closed))  # limits alone say nothing about access
    assert not policy.allows(ANONYMOUS, adapter("d", opened))
    assert policy.allows("alice", adapter("d", closed))


def test_two_rules_for_one_adapter_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="'a' is in `private` and has an `access` as well"):
        make_run(tmp_path, adapters={"a": {"access": {"policy": "open"}}}, private={"a": ["alice"]})


def test_an_address_is_the_same_in_any_case(tmp_path: Path) -> None:
    """The catalog and signed requests have the checksummed one, whatever the settings say."""
    poet, bard = f"{WALLET.address}/poet", f"{WALLET.address}/bard"
    caller = WALLET.address.lower()
    run = make_run(
        tmp_path,
        private={poet.lower(): ["alice"]},
        adapters={bard.lower(): {"access": {"policy": "allow-list"}, "tokens_per_day": 5}},
        callers={caller: hashlib.sha256(b"my key").hexdigest()},
        caller_limits={caller: {"tokens_per_day": 7}},
    )
    policy = AccessPolicy(run)
    assert policy.allows("alice", adapter(poet))
    assert not policy.allows("bob", adapter(poet))
    assert not policy.allows("alice", adapter(bard))
    assert policy.adapter_limits(bard).tokens_per_day == 5
    assert policy.caller("my key") == WALLET.address
    assert policy.limits(policy.caller("my key")).tokens_per_day == 7


@pytest.mark.parametrize(
    ("setting", "value", "suffix"),
    [("private", ["alice"], "/poet"), ("adapters", {}, "/poet"), ("callers", "ab" * 32, ""), ("caller_limits", {}, "")],
)
def test_two_spellings_of_one_address_are_refused(tmp_path: Path, setting: str, value: Any, suffix: str) -> None:
    twice = {f"{spelling}{suffix}": value for spelling in (WALLET.address, WALLET.address.lower())}
    with pytest.raises(InvalidArgument, match=rf"access.{setting}: '{WALLET.address}{suffix}' is there twice"):
        make_run(tmp_path, **{setting: twice})


def test_token_gates(tmp_path: Path) -> None:
    run, chain, gated = make_run(tmp_path), Chain(), adapter("a", GATED)
    now = time.time()
    assert not AccessPolicy(run).allows(WALLET.address, gated)  # without a view: nobody
    policy = AccessPolicy(run, chain)
    assert not policy.allows(WALLET.address, gated)  # never read
    for balance, age, expected in [
        (5, 0, True),
        (6, 500, True),
        (4, 0, False),
        (5, 700, False),  # too old
        (5, -3600, False),  # read in the future: the clock was set back
    ]:
        chain.holdings[WALLET.address] = Holding(balance, now - age)
        assert policy.allows(WALLET.address, gated) is expected, (balance, age)
    chain.holdings[WALLET.address] = chain.holdings["alice"] = Holding(5, now)
    assert policy.allows(WALLET.address, gated)
    assert not policy.allows("alice", gated)  # holds nothing: no address
    chain.fault = ConnectionError("down")
    assert not policy.allows(WALLET.address, gated)


# --- callers ----------------------------------------------------------------------------------------------------------


def test_keys_of_the_settings_and_of_the_store(tmp_path: Path) -> None:
    run = make_run(tmp_path, callers={"alice": key_digest("hers").upper()})
    policy = AccessPolicy(run)
    with CallerStore(run.callers_path) as store:
        record, api_key = store.add_key("bob")
        assert policy.caller("hers") == "alice"
        assert policy.caller(api_key) == "bob"
        assert policy.caller(None) == policy.caller("") == ANONYMOUS
        store.revoke(record.id)
    for wrong in (api_key, "HERS", "olk_", api_key[:-1]):
        with pytest.raises(InvalidArgument) as caught:
            policy.caller(wrong)
        assert str(caught.value) == "[INVALID_ARGUMENT] api_key: unknown key"
    run.callers_path.unlink()
    for anybody in ("hers", api_key):
        with pytest.raises(Unavailable):
            policy.caller(anybody)
    with pytest.raises(Unavailable):
        policy.limits(ANONYMOUS)


def test_an_expired_key_stays_so_when_the_clock_is_set_back(tmp_path: Path) -> None:
    run, clock = make_run(tmp_path), SetClock(time.time())
    policy = AccessPolicy(run, clock=clock)
    with CallerStore(run.callers_path) as store:
        _, api_key = store.add_key("bob", expires_at=int(clock.now) + 100)
    assert policy.caller(api_key) == "bob"
    clock.now += 101
    with pytest.raises(InvalidArgument):
        policy.caller(api_key)
    clock.now -= 60
    with pytest.raises(InvalidArgument):
        policy.caller(api_key)


def test_a_closed_server_wants_a_key(tmp_path: Path) -> None:
    policy = AccessPolicy(make_run(tmp_path, require_key=True))
    with pytest.raises(InvalidArgument, match="this server wants a key"):
        policy.caller(None)


def test_limits_come_from_three_places_number_by_number(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        caller_limits={"alice": {"requests_per_minute": 1}},
        default_limits={"requests_per_minute": 100, "tokens_per_day": 1000},
        adapters={"emoji": {"tokens_per_day": 9}},
    )
    with CallerStore(run.callers_path) as store:
        store.set_limits("alice", UsageLimits(requests_per_minute=2, tokens_per_day=3))
        store.set_limits("bob", UsageLimits(tokens_per_day=0))
    policy = AccessPolicy(run)
    assert policy.limits("alice") == UsageLimits(requests_per_minute=1, tokens_per_day=3)
    assert policy.limits("bob") == UsageLimits(requests_per_minute=100, tokens_per_day=0)
    assert policy.limits(ANONYMOUS) == UsageLimits(requests_per_minute=100, tokens_per_day=1000)
    assert policy.adapter_limits("emoji").tokens_per_day == 9
    assert policy.adapter_limits("other") == UsageLimits()


# --- signed requests --------------------------------------------------------------------------------------------------


def wallet_token(log_id: str, account: Account, expires: int) -> str:
    """A token as a wallet makes it, by somebody else's code."""
    message = encode_defunct(text=login_message(bytes.fromhex(log_id), account.address, expires))
    return signed_token(account.address, expires, account.sign_message(message).signature.hex())


def test_the_message_is_what_the_document_says() -> None:
    assert login_message(b"\xab" * 32, WALLET.address.lower(), 1_800_000_000) == (
        f"OpenLoRA login\nserver: {'ab' * 32}\naddress: 0x19E7E376E7C213B7E7e7e46cc70A5dD086DAff2A\nexpires: 1800000000"
    )


def test_our_client_signs_what_wallets_sign(tmp_path: Path) -> None:
    log_id = write_log_key(make_run(tmp_path))
    ours = login_token("0x" + "11" * 32, log_id, 60)
    assert ours == wallet_token(log_id, WALLET, int(ours.split(":")[2]))
    assert login_token("11" * 32, "0x" + log_id).split(":")[1] == WALLET.address
    for wrong in ("", "11" * 31, "zz" * 32):
        with pytest.raises(InvalidArgument) as caught:
            login_token(wrong, log_id)
        assert wrong == "" or wrong not in str(caught.value)


def test_a_signed_request_is_its_addresses(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    log_id = write_log_key(run)
    token = wallet_token(log_id, WALLET, int(time.time()) + 600)
    policy = AccessPolicy(run)
    with pytest.raises(InvalidArgument, match=f"api_key: {WALLET.address} is no caller of this server"):
        policy.caller(token)
    with CallerStore(run.callers_path) as store:
        record = store.add_address(WALLET.address, WALLET.address)
        assert policy.caller(token) == WALLET.address
        low = token.replace(WALLET.address, WALLET.address.lower())
        assert policy.caller(low) == WALLET.address
        v = int(token[-2:], 16)
        assert policy.caller(token[:-2] + f"{v - 27:02x}") == WALLET.address  # a wallet that writes 0 or 1
        store.revoke(record.id)
        with pytest.raises(InvalidArgument, match="is no caller"):
            policy.caller(token)
        store.add_address("alice", WALLET.address)
        assert policy.caller(token) == "alice"


def test_any_address_where_the_operator_says_so(tmp_path: Path) -> None:
    for place, (settings, taken) in enumerate(
        [
            ({"signed_requests": "any"}, True),
            ({"signed_requests": "any", "require_key": True}, False),
            ({"signed_requests": "known"}, False),
            ({"signed_requests": "off"}, False),
        ]
    ):
        run = make_run(tmp_path / str(place), **settings)
        token = wallet_token(write_log_key(run), WALLET, int(time.time()) + 600)
        policy = AccessPolicy(run)
        if taken:
            assert policy.caller(token) == WALLET.address
            with CallerStore(run.callers_path) as store:
                store.revoke(store.add_address(WALLET.address, WALLET.address).id)
        with pytest.raises(InvalidArgument):
            policy.caller(token)  # an address that was revoked isn't just any address


def test_tokens_that_are_no_good(tmp_path: Path) -> None:
    run, clock = make_run(tmp_path, signed_requests="any"), SetClock(time.time())
    log_id, now = write_log_key(run), int(clock.now)
    policy = AccessPolicy(run, clock=clock)
    good = wallet_token(log_id, WALLET, now + 600)
    assert policy.caller(good) == WALLET.address
    scheme, address, expires, signature = good.split(":")
    r, s, v = signature[:64], int(signature[64:128], 16), int(signature[128:], 16)
    high_s = f"{r}{CURVE_ORDER - s:064x}{55 - v:02x}"
    other_server = write_log_key(make_run(tmp_path / "other"), nonce=b"\2" * 32)
    bad = {
        "another server": wallet_token(other_server, WALLET, now + 600),
        "another's address": ":".join([scheme, OTHER.address, expires, signature]),
        "another expiry": ":".join([scheme, address, str(now + 601), signature]),
        "a flipped bit": ":".join([scheme, address, expires, f"{int(signature[0], 16) ^ 1:x}" + signature[1:]]),
        "the other s": ":".join([scheme, address, expires, high_s]),
        "v 29": ":".join([scheme, address, expires, signature[:128] + "1d"]),
        "zeros": ":".join([scheme, address, expires, "00" * 65]),
        "ones": ":".join([scheme, address, expires, "ff" * 65]),
        "expired": wallet_token(log_id, WALLET, now - 1),
        "too long": wallet_token(log_id, WALLET, now + MAX_LIFETIME_SECONDS + 60),
        "a plain signature": ":".join([scheme, address, expires, WALLET.unsafe_sign_hash(b"\1" * 32).signature.hex()]),
    }
    forms = ["eip191:", "eip191:x", good + "0", good[:-1], good.replace(":", ";"), good + "\n", " " + good[7:]]
    for name, token in [*bad.items(), *((form, form) for form in forms)]:
        with pytest.raises(InvalidArgument) as caught:
            policy.caller(token)
        assert caught.value.field == "api_key", name
    clock.now += 601
    with pytest.raises(InvalidArgument, match="expired"):
        policy.caller(good)
    clock.now -= 300
    with pytest.raises(InvalidArgument, match="expired"):
        policy.caller(good)  # the clock was set back


def test_without_the_logs_key_no_signature_counts(tmp_path: Path) -> None:
    policy = AccessPolicy(make_run(tmp_path, signed_requests="any"))
    with pytest.raises(Unavailable, match="key is not there yet"):
        policy.caller(wallet_token("00" * 32, WALLET, int(time.time()) + 60))


def test_every_key_can_sign(tmp_path: Path) -> None:
    run = make_run(tmp_path, signed_requests="any")
    log_id, policy = write_log_key(run), AccessPolicy(run)
    for number in range(50):
        secret = PrivateKey().secret.hex()
        assert policy.caller(login_token(secret, log_id)) == Account.from_key(secret).address, number


def test_eth_account_is_in_no_server_process() -> None:
    """It raises the recursion limit, so that deep JSON kills a process instead of raising."""
    code = (
        "import sys, openlora.serving.resolve, openlora.serving.generate, openlora.serving.attribute, openlora.cli, "
        "openlora_gateway.app, openlora_client; "
        "sys.exit('eth_account' in sys.modules or sys.getrecursionlimit() != 1000)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
