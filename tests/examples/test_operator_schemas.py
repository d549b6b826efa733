"""The YAMLs of examples/cluster against what reads them: the operators' schemas, Ray's own, AWS's.

tests/data/operators holds the schemas of custom resources as their repositories have them; it says which. As the
API server does with strict validation, a field that a schema does not have is refused.
"""

import copy
import gzip
import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.conftest import ROOT

CLUSTER = ROOT / "examples" / "cluster"
SCHEMAS = ROOT / "tests" / "data" / "operators" / "schemas.json.gz"
LAUNCHED = ("on-premises", "aws")
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
# Of every object, and of a pod's template; the API server knows it, and schemas of custom resources leave it out.
META = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": TEXTS, "annotations": TEXTS},
    "additionalProperties": False,
}


def closed(schema):
    """The schema without room for fields that it does not name."""
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {name: closed(each) for name, each in schema["properties"].items()}
        schema.setdefault("additionalProperties", False)
        if schema["properties"].get("metadata") == {"type": "object"}:
            schema["properties"]["metadata"] = META
    if "items" in schema:
        schema["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = closed(schema["additionalProperties"])
    return schema


@pytest.fixture(scope="module")
def validators():
    """By `apiVersion kind`."""
    known = json.loads(gzip.decompress(SCHEMAS.read_bytes()))["schemas"]
    return {name: Draft202012Validator(closed(schema)) for name, schema in known.items()}


def documents(name):
    return list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8")))


def misspelt(value, schema):
    """(where, a copy with one key misspelt) for each key that the schema names; keys of the user's own are free."""
    if isinstance(value, dict):
        for name in value:
            known = schema.get("properties", {}).get(name)
            if known is not None:
                yield name, {f"{key}x" if key == name else key: each for key, each in value.items()}
            for where, changed in misspelt(value[name], known or {}):
                yield f"{name}.{where}", value | {name: changed}
    elif isinstance(value, list):
        for at, each in enumerate(value):
            for where, changed in misspelt(each, schema.get("items", {})):
                yield f"{at}.{where}", [*value[:at], changed, *value[at + 1 :]]


@pytest.mark.parametrize("name", ["kuberay", "kueue"])
def test_what_kubernetes_is_given_is_what_the_operators_take(validators, name):
    for document in documents(name):
        validator = validators[f"{document['apiVersion']} {document['kind']}"]
        assert [f"{each.json_path}: {each.message[:200]}" for each in validator.iter_errors(document)] == []


@pytest.mark.parametrize(("name", "least"), [("kuberay", 50), ("kueue", 70)])
def test_every_misspelt_field_of_them_is_caught(validators, name, least):
    count = 0
    for document in documents(name):
        validator = validators[f"{document['apiVersion']} {document['kind']}"]
        for where, changed in misspelt(document, validator.schema):
            assert not validator.is_valid(changed), where
            count += 1
    assert count >= least


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "1"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "backoffLimit"), 1.5),
        (("metadata", "labels"), ["deadbench"]),
    ],
)
def test_a_value_of_another_kind_is_caught(validators, path, value):
    (job,) = documents("kuberay")
    changed = copy.deepcopy(job)
    *to, last = path
    at = changed
    for step in to:
        at = at[step]
    at[last] = value
    assert not validators["ray.io/v1 RayJob"].is_valid(changed)


def test_only_versions_that_the_operators_store_are_written(validators):
    assert {f"{each['apiVersion']} {each['kind']}" for n in ("kuberay", "kueue") for each in documents(n)} == {
        *validators
    }


@pytest.fixture(scope="module")
def launcher_schema():
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))


def of_the_launcher(schema):
    """Ray's schema, its node types by their names, closed where Ray leaves it open for other providers."""
    node_type = schema["properties"]["available_node_types"]["patternProperties"][".*"]
    schema = copy.deepcopy(schema)
    schema["properties"]["provider"]["additionalProperties"] = False
    types = {"properties": dict.fromkeys(("head", "gpu"), node_type), "additionalProperties": False}
    schema["properties"]["available_node_types"] = types
    schema["properties"]["min_workers"] = schema["properties"]["max_workers"]  # the local provider's, taken out by Ray
    return schema


@pytest.mark.parametrize(("name", "least"), [("on-premises", 15), ("aws", 20)])
def test_every_misspelt_field_of_the_launchers_files_is_caught(launcher_schema, name, least):
    (config,) = documents(name)
    schema = of_the_launcher(launcher_schema)
    validator = Draft202012Validator(schema | {"additionalProperties": False})
    assert [each.message for each in validator.iter_errors(config)] == []
    found = list(misspelt(config, schema))
    assert len(found) >= least
    for where, changed in found:
        assert not validator.is_valid(changed), where


def test_aws_takes_the_machines():
    session = pytest.importorskip("botocore.session").get_session()
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    from botocore.validate import ParamValidator

    (config,) = documents("aws")
    for each in config["available_node_types"].values():
        asked = each["node_config"] | {"MinCount": 1, "MaxCount": 1}  # as Ray adds
        assert not ParamValidator().validate(asked, shape).has_errors()
        for name in each["node_config"]:
            changed = {f"{key}x" if key == name else key: value for key, value in asked.items()}
            assert ParamValidator().validate(changed, shape).has_errors(), name
    known = session.get_service_model("ec2").shape_for("InstanceType").enum
    assert {each["node_config"]["InstanceType"] for each in config["available_node_types"].values()} <= {*known}
