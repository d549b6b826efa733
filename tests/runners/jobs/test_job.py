"""What a job says of its checkpoint before anything is loaded."""

from dataclasses import replace

from deadbench.runners.jobs.job import tokens_seen
from tests.runners.jobs.test_build import _read


def test_tokens_seen_are_the_trainers_count_else_the_steps_times_the_registrys(tmp_path):
    for name, text in {"counted": '{"num_input_tokens_seen": 999}', "step-7": "{}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(text)
    twins = [_read(source=str(tmp_path / name)) for name in ("counted", "step-7")]
    counted, named = (replace(r, model=r.model.model_copy(update={"tokens_per_step": None})) for r in twins)
    assert tokens_seen(counted, 7) == 999
    assert tokens_seen(named, 7) is None, "nobody says what a step took"
    known = [replace(r, model=r.model.model_copy(update={"tokens_per_step": 100})) for r in (counted, named)]
    assert [tokens_seen(read, 7) for read in known] == [999, 700]
    assert tokens_seen(known[1], None) is None
    assert tokens_seen(replace(known[1], read="random"), 7) is None
