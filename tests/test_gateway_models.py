"""`/v1/models` of a catalog: what a name's current version says, and what a caller may know of."""

import pytest

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_rows import AdapterRecord, BaseFacts
from openlora.config import BaseModelFacts, RunConfig, load_settings
from openlora.errors import AdapterNotFound
from openlora.serving.access.policy import AccessPolicy
from openlora_gateway.models import ModelList

BASE = "b" * 64


@pytest.fixture
def run(tmp_path):
    facts = BaseModelFacts(name="m", path=tmp_path, digest=BASE, card=None, eos_token_ids=(1,), max_model_len=64)
    access = {"access.callers": {"alice": "a" * 64}, "access.private": {"secret": ["alice"]}}
    settings = load_settings(model=tmp_path, **access)
    return RunConfig(
        settings=settings, base=facts, state_dir=tmp_path, socket_dir=tmp_path, shm_prefix="x", launcher_pid=7
    )


def test_models_follow_the_current_version_and_the_policy(run):
    models = ModelList(run, AccessPolicy(run))
    with Catalog(run.catalog_path) as catalog:
        catalog.set_base(BaseFacts("/m", BASE, 64))
        for name, digest, owner in (("poet", "1", "one"), ("poet", "2", "two"), ("secret", "3", "three")):
            catalog.put(AdapterRecord(name, 0, digest * 64, 8, "ready", "", {"owner": owner}, base=BASE))
        catalog.put(AdapterRecord("torn", 0, "4" * 64, 8, "quarantined", "holds NaN", None, base=BASE))

        def owners(caller):
            entries = models.entries(caller)
            assert [models.entry(caller, entry["id"]) for entry in entries] == entries
            return {entry["id"]: entry["owned_by"] for entry in entries[1:]}

        assert owners("alice") == {"poet": "two", "secret": "three"}
        assert owners("bob") == {"poet": "two"}
        catalog.use("poet", 1)
        assert owners("bob") == {"poet": "one"}
        refused = []
        for name in ("nobody", "secret", "torn", "po/et"):
            with pytest.raises(AdapterNotFound) as caught:
                models.entry("bob", name)
            refused.append(str(caught.value))
        assert refused == [f"[ADAPTER_NOT_FOUND] no adapter {name!r}" for name in ("nobody", "secret", "torn", "po/et")]
