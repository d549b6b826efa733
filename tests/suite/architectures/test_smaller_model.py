"""A tower that takes pictures of one size alone is tried as its configuration lays it out for smaller ones."""

import torch
from torch import nn

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.locate import locate_final_norm as locate
from deadbench.suite.architectures.smaller_model import for_smaller_pictures
from deadbench.suite.tracing import smaller_pictures as pictures

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 2,
    "global_attn_indexes": [1],
    "pretrain_image_size": 32,
}
PAINTER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "merge_index": 0,
    "num_attention_heads": 2,
    "image_size": [64, 32],
    "patch_size": 8,
    "pretrain_image_size": 32,
    "intermediate_hidden_state_indices": [1],
    "decoder_hidden_size": 8,
}


def smaller(config):
    return for_smaller_pictures(config, build_model(config, "meta"))


def test_what_is_stated_of_the_size_is_divided_wherever_it_is():
    tower = build_config({"model_type": "sam3_vit_model", **TOWER})
    nested = build_config(
        {"model_type": "sam3_vision_model", "backbone_config": {"model_type": "sam3_vit_model"} | TOWER}
    )
    painter = build_config({"model_type": "seggpt"} | PAINTER)
    assert smaller(tower).image_size == 16
    assert smaller(nested).backbone_config.image_size == 16
    assert list(smaller(painter).image_size) == [16, 8]
    assert (tower.image_size, nested.backbone_config.image_size, list(painter.image_size)) == (64, 64, [64, 32])


def test_where_nothing_is_stated_or_other_modules_come_of_it_there_is_none():
    words = build_config({"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    assert smaller(words) is None
    tower = build_config({"model_type": "sam3_vit_model", **TOWER})
    assert for_smaller_pictures(tower, nn.Linear(2, 2)) is None
    tower.image_size = 1
    assert for_smaller_pictures(tower, nn.Linear(2, 2)) is None


def test_a_search_of_a_tower_for_one_size_computes_smaller_pictures_and_says_the_same(monkeypatch):
    config = build_config({"model_type": "sam3_vit_model", **TOWER})
    whole, seen, call = locate(config), [], nn.Conv2d.forward
    monkeypatch.setattr(pictures, "_LARGE_PASS", 1000)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: seen.append(x) or call(self, x))
    skeleton, given = build_model(config, "meta"), {"pixel_values": torch.zeros(1, 3, 64, 64)}
    assert pictures.returns_much(skeleton, given)
    assert pictures.smaller_pictures(skeleton, given) is None, "it takes pictures of one size alone"
    assert locate(config) == whole
    assert whole.family == "none"
    assert {each.shape[-1] for each in seen if not each.is_meta} == {16}
