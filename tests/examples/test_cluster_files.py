"""The example cluster files are what Ray's launcher and KubeRay take, as far as that can be told without machines."""

import json

import pytest
import yaml

from tests.conftest import ROOT


@pytest.mark.parametrize("name", ["on-premises", "aws"])
def test_cluster_files_are_what_rays_launcher_takes(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "examples" / "cluster" / f"{name}.yaml").read_text(encoding="utf-8"))
    validate_config(prepare_config(config))
    commands = json.dumps(config)
    assert "ray stop" not in commands
    assert "RAY_AUTH_MODE=token" in commands


def test_the_kuberay_file_is_a_whole_job():
    job = yaml.safe_load((ROOT / "examples" / "cluster" / "kuberay.yaml").read_text(encoding="utf-8"))
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {each["image"] for group in groups for each in group["template"]["spec"]["containers"]}
    assert (job["kind"], len(images), cluster["authOptions"]["mode"]) == ("RayJob", 1, "token")
    assert " --out s3://" in job["spec"]["entrypoint"]
