"""`plan` and `apply`: what they say, what Feast knows afterwards, and who refuses to run without them."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import feast
import msgspec
import pytest
import structlog
import typeguard
from feast.lineage.registry_lineage import RegistryLineageGenerator
from feast.repo_operations import get_repo_files

from config.settings import Settings
from features.definitions import DefinitionsError, compile_definitions
from features.plan import At, CodeChangedError, Derived
from features.program import Program
from headrace.embedded import EmbeddedBroker
from registry import apply as applying
from registry.compile import compile_to_feast
from registry.ordinary import declared
from registry.plans import PLAN_SOURCE, PLAN_TAG, plan_of, registered_plan, to_tag
from registry.register import register
from serving.app import create_app
from store.connect import connect
from store.keys import Keyspace
from store.plans import ApplyError, NotAppliedPlanError, load_plan, plan_changes
from streams.decode import Decoder
from tests.support.served import ROOT, SHARDS, catalogue, project_folder

replace = msgspec.structs.replace
KEYS = ("user_id", "item_id", "seller_id")
"""Feast's own registry lists a stream view's entity key among its features."""


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path, redis_url: str, broker: EmbeddedBroker) -> Settings:
    """A project where nothing is applied."""
    return Settings(
        repo=project_folder(tmp_path / "project"),
        redis_url=redis_url,
        kafka=broker.bootstrap_servers,
        topics="auto",
        shards=SHARDS,
    )


def apply(settings: Settings) -> applying.Applied:
    return applying.apply(settings, connect(settings.redis_url.get_secret_value(), 10))


def store_of(settings: Settings) -> feast.FeatureStore:
    store = feast.FeatureStore(str(settings.repo))
    store.config.online_store.redis_url = settings.redis_url.get_secret_value()
    return store


def catalogue_of(store: feast.FeatureStore) -> dict[str, Any]:
    """Everything that Feast's registry says of a project, as plain data that can be compared."""
    registry, project = store.registry, store.project
    found: dict[str, Any] = {"plan": registry.get_data_source(PLAN_SOURCE, project).tags[PLAN_TAG]}
    for entity in registry.list_entities(project):
        if entity.name == "__dummy":  # Feast's own.
            continue
        found[f"entity {entity.name}"] = (entity.join_key, str(entity.value_type), entity.description, entity.tags)
    for view in (*registry.list_stream_feature_views(project), *registry.list_on_demand_feature_views(project)):
        schema = sorted((field.name, str(field.dtype), field.description, field.tags) for field in view.features)
        found[f"view {view.name}"] = (type(view).__name__, view.description, view.owner, view.tags, schema)
    for service in registry.list_feature_services(project):
        projections = [
            (each.name, [field.name for field in each.features]) for each in service.feature_view_projections
        ]
        found[f"service {service.name}"] = (service.description, service.owner, service.tags, projections)
    for source in registry.list_data_sources(project):
        found[f"source {source.name}"] = (type(source).__name__, source.description, source.tags)
    return found


# Applying


def test_the_first_apply_registers_everything_and_the_second_has_nothing_to_do(settings: Settings) -> None:
    plan, announced, _ = plan_changes(settings, ordinary=declared(settings).plan)
    first = apply(settings)
    assert first.changes == announced
    assert {each.kind for each in first.changes} == {"adds"}
    said = {(each.what, each.name) for each in first.changes}
    assert {("view", view.name) for view in plan.views} <= said
    assert {("service", service.name) for service in plan.services} <= said
    assert first.records == 3 * SHARDS
    registered = catalogue_of(store_of(settings))
    second = apply(settings)
    assert (second.changes, second.topics, second.records) == ([], [], 0)
    assert plan_changes(settings, ordinary=declared(settings).plan).changes == []
    assert catalogue_of(store_of(settings)) == registered
    assert registered_plan(store_of(settings).registry, "headrace") == plan


def test_feast_describes_what_was_declared(settings: Settings) -> None:
    plan = apply(settings).plan
    store = store_of(settings)
    assert {entity.name: entity.join_key for entity in store.list_entities()} == {
        "user": "user_id",
        "item": "item_id",
        "seller": "seller_id",
    }
    views: dict[str, Any] = {
        view.name: view for view in (*store.list_stream_feature_views(), *store.list_on_demand_feature_views())
    }
    ours = [spec for spec in plan.views if not spec.given]
    assert set(views) == {view.name for view in ours}
    assert {view.name for view in store.list_feature_views()} == {spec.name for spec in plan.views if spec.given}
    registry: Any = store.registry
    of_cross_views = {each.spec.name: each for each in registry.proto().on_demand_feature_views}
    for spec in ours:
        view = views[spec.name]
        assert (view.description, view.owner) == (spec.doc, spec.owner)
        assert spec.owner
        assert spec.tags.items() <= view.tags.items()
        # Feast writes what a field of an on-demand view is, and does not read it back: from_proto leaves it out.
        fields = view.features if len(spec.entities) == 1 else of_cross_views[spec.name].spec.features
        assert {field.name: field.description for field in fields if field.name not in KEYS} == {
            feature.name: feature.doc for feature in plan.features.values() if feature.view == spec.name
        }
    for service in plan.services:
        registered = store.get_feature_service(service.name)
        assert (registered.description, registered.owner) == (service.doc, service.owner)
        assert registered.tags == {**service.tags, "version": "1"}
        projected = {
            f"{each.name}__{field.name}" for each in registered.feature_view_projections for field in each.features
        }
        assert projected == set(service.features)
    assert views["user_activity"].tags["topics"] == "clicks, impressions, likes"


def test_lineage_shows_every_topic_of_a_view(settings: Settings) -> None:
    """As `feast ui` draws it, which has one stream source a view: a view's topics are one source together."""
    plan = apply(settings).plan
    store = store_of(settings)
    registry: Any = store.registry
    direct, indirect = RegistryLineageGenerator().generate_lineage(registry.proto())
    drawn = {
        (each.source.type.value, each.source.name, each.target.name)
        for each in direct
        if each.target.type.value == "featureView"
    }
    assert "__dummy" not in str([*direct, *indirect])
    sources = {each.name for each in store.list_data_sources()}
    for view in (each for each in plan.views if not each.given):
        if len(view.entities) > 1:
            assert {("entity", name, view.name) for name in view.entities} <= drawn
            continue
        events = {measure.event for aggregation in view.aggregations for measure in aggregation.measures}
        topics = ",".join(sorted(plan.event(event).topic for event in events))
        assert ("dataSource", topics, view.name) in drawn
        assert {topics, *topics.split(",")} <= sources


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_changed_plan_leaves_every_view_that_it_still_has(settings: Settings, times: int) -> None:
    """However often: deleting what is registered under the same name as what is applied would take it away.

    Feast reads a cross view back as its own class, not as the subclass that was applied.
    """
    plan = apply(settings).plan
    for number in range(times):
        plan = replace(plan, services=tuple(replace(each, doc=f"Anew {number}") for each in plan.services))
        register(store_of(settings), plan, settings, declared(settings).objects)
    store = store_of(settings)
    assert [view.name for view in store.list_on_demand_feature_views()] == ["user_item"]
    assert {view.name for view in store.list_stream_feature_views()} == {
        view.name for view in plan.views if view.name != "user_item" and not view.given
    }
    assert store.get_feature_service("ranking_v1").description == f"Anew {times - 1}"
    assert registered_plan(store.registry, "headrace") == plan


def test_what_is_no_longer_declared_disappears_from_feast(settings: Settings) -> None:
    before = apply(settings).plan
    after = replace(
        before,
        views=tuple(view for view in before.views if view.name not in ("seller_activity", "user_item")),
        services=tuple(each for each in before.services if each.name == "feed_v1"),
        entities=tuple(each for each in before.entities if each.name != "seller"),
    )
    register(store_of(settings), after, settings, declared(settings).objects)
    registered = catalogue_of(store_of(settings))
    assert {name for name in registered if name.startswith(("view", "service", "entity"))} == {
        "view item_activity",
        "view user_activity",
        "view user_history",
        "view user_taste",
        "service feed_v1",
        "entity item",
        "entity user",
    }
    register(store_of(settings), before, settings, declared(settings).objects)
    assert "view seller_activity" in catalogue_of(store_of(settings))


def test_the_number_of_shards_is_fixed_by_the_first_apply(settings: Settings) -> None:
    apply(settings)
    other = settings.model_copy(update={"shards": SHARDS * 2})
    for refused in (lambda: plan_changes(other, ordinary=declared(other).plan), lambda: apply(other)):
        with pytest.raises(ApplyError, match=f"HEADRACE_SHARDS={SHARDS * 2}.*set it to {SHARDS}"):
            refused()
    assert registered_plan(store_of(settings).registry, "headrace") == catalogue()


def test_records_that_redis_lost_are_initialised_again(settings: Settings) -> None:
    apply(settings)
    client: Any = connect(settings.redis_url.get_secret_value(), 10)
    client.delete(Keyspace("headrace", SHARDS).commit_record("user", 1))
    again = apply(settings)
    assert (again.changes, again.records) == ([], 1)


def test_a_broker_that_is_away_is_an_error_that_names_the_setting(settings: Settings, monkeypatch: Any) -> None:
    monkeypatch.setattr(applying, "_KAFKA_TIMEOUT_S", 0.5)
    for topics in ("auto", "create"):
        away = settings.model_copy(
            update={"kafka": "127.0.0.1:1", "topics": topics, "kafka_options": {"log_level": "0"}}
        )
        with pytest.raises(ApplyError, match=r"127\.0\.0\.1:1.*HEADRACE_KAFKA"):
            applying.create_topics(away, catalogue())


# Feast's own command and clients


def test_feast_apply_registers_what_headrace_apply_does(settings: Settings, tmp_path: Path) -> None:
    """The real command in a copy of the project, where .feastignore keeps it from what it should not import."""
    apply(settings)
    ours = catalogue_of(store_of(settings))
    copy = tmp_path / "copy"
    copy.mkdir()
    for folder in ("config", "features", "store", "registry", "streams", "training", "serving", "headrace"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("feature_store.yaml", ".feastignore"):
        shutil.copy(ROOT / file, copy)
    broken = "raise SystemExit('imported what it should not')"
    for stray in ("stray.py", "rstray.py", "stray/module.py", "tests/t.py", "registry/stray.py", "registry/f_stray.py"):
        (copy / stray).parent.mkdir(exist_ok=True)
        (copy / stray).write_text(broken)
    feast_command(settings, copy, "apply")
    theirs = catalogue_of(feast.FeatureStore(str(copy)))
    assert theirs == ours


def feast_command(settings: Settings, folder: Path, *arguments: str) -> str:
    """What a command of Feast's in a project's folder prints."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")},
        **settings.environment(),
        "HEADRACE_REPO": str(folder),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PYTHONWARNINGS": "ignore",
        "FEAST_USAGE": "False",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from feast.cli.cli import cli; cli()", "-c", str(folder), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


OWN = """
from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64
from headrace.feast_repo import *

shop = Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.INT64)
sizes = FeatureView(
    name="sizes", entities=[shop], ttl=timedelta(days=1), schema=[Field(name="size", dtype=Int64)],
    source=FileSource(name="sizes_file", path="sizes.parquet", timestamp_field="at"),
)


@on_demand_feature_view(sources=[sizes], schema=[Field(name="double", dtype=Float64)])
def doubled(inputs):
    return inputs[["size"]].rename(columns={"size": "double"}) * 2.0
"""


def test_a_repository_of_ones_own_takes_one_line_and_keeps_what_else_it_has(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By either command, however often, and also when what we made changes or goes.

    A repository without our objects lost them all to `feast apply`; `headrace apply` deleted all that was not ours.
    """
    folder = project_folder(tmp_path / "own")
    (folder / "ours.py").write_text(OWN)
    own = settings.model_copy(update={"repo": folder})
    plan = apply(own).plan
    ours = catalogue_of(store_of(own))
    feast_command(settings, folder, "apply")
    both = catalogue_of(store_of(own))
    assert ours.items() <= both.items()
    theirs = {"entity shop", "view doubled", "source sizes_file"}
    assert both.keys() - ours.keys() == theirs
    for number in range(2):
        changed = replace(plan, services=tuple(replace(each, doc=f"Anew {number}") for each in plan.services))
        assert register(store_of(own), changed, own)
        assert theirs <= catalogue_of(store_of(own)).keys()
        assert "sizes" in {view.name for view in store_of(own).list_batch_feature_views()}
    less = replace(plan, views=tuple(each for each in plan.views if each.name == "seller_activity"), services=())
    assert register(store_of(own), less, own)
    left = catalogue_of(store_of(own)).keys()
    assert (theirs <= left, "view seller_activity" in left, "view user_item" in left) == (True, True, False)
    feast_command(settings, folder, "apply")
    assert catalogue_of(store_of(own)) == both


def test_what_was_taken_out_of_the_registry_comes_back(settings: Settings) -> None:
    """The plan's text in the registry says nothing of it: by that alone there would be nothing to do."""
    assert apply(settings).registered
    before = catalogue_of(store_of(settings))
    assert not apply(settings).registered
    feast_command(settings, settings.repo, "delete", "user_activity")
    store_of(settings).delete_feature_service("feed_v1")
    assert catalogue_of(store_of(settings)) != before
    assert apply(settings).registered
    assert catalogue_of(store_of(settings)) == before


def test_a_plan_in_the_tags_of_the_project_is_read_and_moves(settings: Settings) -> None:
    """It was there before it had a source of its own: lost, what it made would be nobody's, and stay for ever."""
    plan = apply(settings).plan
    store = store_of(settings)
    registry: Any = store.registry
    registry.delete_data_source(PLAN_SOURCE, "headrace")
    registry.apply_project(feast.Project(name="headrace", tags={PLAN_TAG: plan.encode(), "team": "ranking"}))
    assert plan_of(store_of(settings).registry, "headrace") == plan
    less = replace(plan, services=plan.services[:1])
    assert register(store_of(settings), less, settings)
    assert [each.name for each in store_of(settings).list_feature_services()] == [plan.services[0].name]
    assert store_of(settings).registry.get_project("headrace").tags == {"team": "ranking"}
    assert plan_of(store_of(settings).registry, "headrace") == less


def test_feasts_commands_say_nothing_of_the_plan_and_have_nothing_to_do(settings: Settings, tmp_path: Path) -> None:
    """Also where the project is described by its owner; `projects list` printed the whole plan."""
    folder = project_folder(tmp_path / "own")
    described = 'from feast import Project\nproject = Project(name="headrace", description="Shoes")\n'
    (folder / "ours.py").write_text(described + "from headrace.feast_repo import *\n")
    own = settings.model_copy(update={"repo": folder})
    apply(own)
    feast_command(own, folder, "apply")
    assert "No changes to registry" in feast_command(own, folder, "plan")
    assert not apply(own).registered
    listed = feast_command(own, folder, "projects", "list")
    assert ("Shoes" in listed, "entities" in listed, len(listed) < 300) == (True, False, True)
    assert "entities" not in feast_command(own, folder, "data-sources", "list")


def test_what_was_disabled_stays_so(settings: Settings) -> None:
    plan = apply(settings).plan
    store_of(settings).disable_feature_view("user_activity")
    assert not apply(settings).registered
    assert register(store_of(settings), replace(plan, services=plan.services[:1]), settings)
    views = {view.name: view.enabled for view in store_of(settings).list_stream_feature_views()}
    assert (views["user_activity"], views["item_activity"]) == (False, True)


def test_what_is_unchanged_has_one_version_and_can_be_printed(settings: Settings) -> None:
    """Feast makes a new version of a view that it takes for another one than it reads back."""
    for _ in range(3):
        apply(settings)
        plan = plan_changes(settings, ordinary=declared(settings).plan).plan
        store_of(settings).apply(list(compile_to_feast(plan, settings).values()))
    store = store_of(settings)
    for view in plan.views:
        assert len(store.registry.list_feature_view_versions(view.name, "headrace")) == 1, view.name
    said = feast_command(settings, settings.repo, "registry-dump")
    assert '"user_activity"' in said
    made = store.get_stream_feature_view("user_activity")
    assert [field.name for field in made.features] == [
        feature.name for feature in plan.features.values() if feature.view == "user_activity"
    ]


def test_feast_imports_one_file_whatever_the_others_are_called(tmp_path: Path) -> None:
    """Also one whose name begins as `registry` does: reports/, research.py, replay.py."""
    shutil.copy(ROOT / ".feastignore", tmp_path)
    wanted = "registry/feast_repo.py"
    strays = (
        *("stray.py", "stray/a.py", "r.py", "research.py", "reports/a.py", "regression.py", "registry_tools.py"),
        *("registry/a.py", "registry/f.py", "registry/features.py", "registry/feast_tools.py", "registry/feast/a.py"),
    )
    for file in (wanted, *strays):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    found = [str(file.relative_to(tmp_path.resolve())) for file in get_repo_files(tmp_path.resolve())]
    assert found == [wanted]


def test_the_registry_is_read_by_feast_without_our_code(settings: Settings, tmp_path: Path) -> None:
    apply(settings)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        f"project: headrace\nprovider: local\nregistry: {settings.repo / 'data' / 'registry.db'}\n"
        "online_store: {type: remote, path: 'http://127.0.0.1:1'}\nentity_key_serialization_version: 3\n"
    )
    program = textwrap.dedent("""
        import importlib.util, json
        for name in ("headrace", "features", "registry", "store", "serving"):
            assert importlib.util.find_spec(name) is None, name
        from feast import FeatureStore
        store = FeatureStore(".")
        print(json.dumps({
            "entities": sorted(each.name for each in store.list_entities()),
            "stream": sorted(each.name for each in store.list_stream_feature_views()),
            "on demand": sorted(each.name for each in store.list_on_demand_feature_views()),
            "services": sorted(each.name for each in store.list_feature_services()),
            "sources": sorted(each.name for each in store.list_data_sources() if "archive" not in each.name),
        }))
    """)
    site = str(Path(feast.__file__).resolve().parent.parent)
    done = subprocess.run(
        # -S and an own path leave out the editable install.
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {site!r})\n{program}"],
        cwd=folder,
        env={"PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "entities": ["item", "seller", "user"],
        "stream": ["item_activity", "seller_activity", "user_activity", "user_history", "user_taste"],
        "on demand": ["user_item"],
        "services": ["feed_v1", "ranking_v1", "seller_v1"],
        "sources": [
            *("clicks", "clicks,impressions,likes", "clicks,likes", "headrace_plan", "impressions"),
            *("item_profile_file", "likes", "stock", "stock_file", "user_profile_file"),
        ],
    }


def test_the_objects_of_one_plan_are_the_same_every_time() -> None:
    plan = catalogue()
    first, second = (compile_to_feast(plan, Settings(kafka="k:1")) for _ in range(2))
    assert list(first) == list(second)
    assert first[PLAN_SOURCE].tags == second[PLAN_SOURCE].tags
    assert first[PLAN_SOURCE].tags[PLAN_TAG] == to_tag(plan)
    assert len(to_tag(plan)) < len(plan.encode()) / 3


# Who runs the applied plan


def test_nothing_runs_before_apply(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(NotAppliedPlanError, match=r"nothing is applied in .*run `headrace apply` first"):
        load_plan(settings)
    with pytest.raises(FileNotFoundError, match=r"feature_store\.yaml.*HEADRACE_REPO"):
        plan_changes(settings.model_copy(update={"repo": tmp_path}), ordinary=declared(settings).plan)


def test_a_folder_that_is_no_project_is_said_to_be_none(settings: Settings, tmp_path: Path) -> None:
    """By those who run the plan too: an errno names no remedy."""
    with pytest.raises(FileNotFoundError, match="HEADRACE_REPO"):
        load_plan(settings.model_copy(update={"repo": tmp_path}))


OWN_DEFINITIONS = '''
from headrace import Entity, Event, agg, cross, derived, service, view
from headrace.types import Array

user = Entity("user", key="user_id", forget_after="90d")
item = Entity("item", key="item_id", forget_after="90d")


class Click(Event, topic="clicks"):
    """A user opened an item."""

    user_id: str
    item_id: str


@view(user)
class UserThing:
    """A user."""

    clicks = agg.count(Click, over=["1h", "24h"])
    seen = agg.last_k(Click, "item_id", 5)

    @derived(clicks["1h"])
    def doubled(clicks: Array) -> Array:
        return clicks * {factor}


@cross(user, item)
class Pair:
    """A pair."""

    known = UserThing.seen.contains(item)


own_v1 = service("own_v1", UserThing)
pair_v1 = service("pair_v1", UserThing.clicks["1h"], Pair)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], str]]:
    """Writes a definitions package and returns its name; written again under its name, it is changed code."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names: set[str] = set()

    def write(name: str, factor: int) -> str:
        (tmp_path / f"{name}.py").write_text(OWN_DEFINITIONS.replace("{factor}", str(factor)))
        sys.modules.pop(name, None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        import linecache

        linecache.clearcache()
        names.add(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_definitions_that_differ_from_what_is_applied_are_warned_of(
    settings: Settings, own: Callable[[str, int], str]
) -> None:
    plan = apply(settings).plan
    assert load_plan(settings) == plan
    other = settings.model_copy(update={"definitions": own("own_differing", 2)})
    with structlog.testing.capture_logs() as logs:
        assert load_plan(other) == plan
    (warning,) = logs
    assert (warning["event"], warning["log_level"], warning["plan"]) == (
        "definitions_differ",
        "warning",
        plan.fingerprint,
    )
    assert warning["changes"]
    assert "headrace apply" in warning["remedy"]
    with structlog.testing.capture_logs() as logs:
        load_plan(settings)
    assert logs == []


async def test_changed_code_of_a_derived_feature_is_refused_by_name(
    settings: Settings, own: Callable[[str, int], str]
) -> None:
    mine = settings.model_copy(update={"definitions": own("own_changing", 2)})
    apply(mine)
    plan = load_plan(mine)
    assert Program(plan, plan.service("own_v1").features).entities == ("user",)
    own("own_changing", 3)
    assert "feature user_thing.doubled: other code" in "\n".join(
        map(str, plan_changes(mine, ordinary=declared(mine).plan).changes)
    )
    with pytest.raises(CodeChangedError, match=r"doubled .*own_changing:UserThing\.doubled.*headrace apply"):
        Program(plan, plan.service("own_v1").features)
    app = create_app(mine, plan)
    with pytest.raises(CodeChangedError, match="doubled"):
        async with app.router.lifespan_context(app):
            pass


def test_a_changed_contract_is_refused_by_the_stream_by_name() -> None:
    plan = catalogue()
    changed = replace(plan, events=tuple(replace(each, fingerprint="0" * 12) for each in plan.events))
    with pytest.raises(CodeChangedError, match=r"contract Click .*headrace apply"):
        Decoder(changed, 1, 0)


def test_definitions_that_are_not_there_or_empty_are_refused(own: Callable[[str, int], str], tmp_path: Path) -> None:
    with pytest.raises(DefinitionsError, match=r"HEADRACE_DEFINITIONS='no_such_package'.*PYTHONPATH"):
        compile_definitions("no_such_package", "headrace", SHARDS)
    (tmp_path / "own_empty.py").write_text("")
    with pytest.raises(DefinitionsError, match="own_empty declares no service"):
        compile_definitions("own_empty", "headrace", SHARDS)
    (tmp_path / "own_needing.py").write_text("import something_that_is_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_installed"):
        compile_definitions("own_needing", "headrace", SHARDS)


def test_an_own_packages_plan_is_applied_and_read_back(settings: Settings, own: Callable[[str, int], str]) -> None:
    mine = settings.model_copy(update={"definitions": own("own_applied", 2)})
    plan = apply(mine).plan
    assert [service.name for service in plan.services] == ["own_v1", "pair_v1"]
    assert load_plan(mine) == plan
    assert {type(spec) for view in plan.views for spec in view.features} >= {Derived}
    assert not any(isinstance(spec, At) for view in plan.views for spec in view.features)
    program = Program(plan, plan.service("pair_v1").features)
    assert set(program.entities) == {"user", "item"}, "who asks for a pair gives both ids"


def test_importing_feast_does_not_compile_it_again_and_others_keep_their_checks() -> None:
    """Without it each worker, server and command takes 3 s more to start: what restarts after a crash waits for it."""
    assert "typeguard" not in feast.Entity.__init__.__code__.co_names
    with pytest.raises(typeguard.TypeCheckError):
        _twice("no number")  # type: ignore[arg-type]  # it is what must be noticed


@typeguard.typechecked
def _twice(number: int) -> int:
    return 2 * number


def test_feast_leaves_no_folder_behind_and_tells_no_child_of_one(tmp_path: Path) -> None:
    """It makes one for its own server's metrics whenever it is imported; killed, or forked from, it never goes."""
    program = "import os, registry.apply; print([name for name in os.environ if name.startswith('PROMETHEUS_')])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMETHEUS_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{program}; os.kill(os.getpid(), 9)"],
        env={**environment, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "[]\n", done.stderr
    assert list(tmp_path.iterdir()) == []
