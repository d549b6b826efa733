"""One entry of models.yaml for a run that was trained with several seeds: a model for each, alike but for `{seed}`.

`id` and `source` (or `checkpoints`) have `{seed}` in them, and `seeds` lists the numbers that take its place, or gives
the `first` and `last`. A suite names them all by the same id. Results that differ in such a number alone are
replicates: `analysis/replicates.py`.
"""

from typing import Any

MARK, KEY = "{seed}", "seeds"
_MOST = 1000


def with_seeds(raw: dict[str, Any]) -> dict[str, Any]:
    """The contents of a registry with a model in the place of each seed of an entry.

    Raises:
        ValueError: seeds that are no numbers, or nothing for them to stand in; one line that names the entry.
    """
    if not isinstance(raw.get("models"), list):
        return raw
    of: dict[str, list[str]] = {}
    models: list[Any] = []
    for each in raw["models"]:
        if not isinstance(each, dict) or KEY not in each:
            models.append(each)
            continue
        seeded = _models(each)
        of[str(each["id"])] = [model["id"] for model in seeded]
        models += seeded
    if not of:
        return raw
    suites = raw.get("suites")
    named = {name: _suite(suite, of) for name, suite in suites.items()} if isinstance(suites, dict) else suites
    return raw | {"models": models} | ({"suites": named} if suites is not None else {})


def _models(entry: dict[str, Any]) -> list[dict[str, Any]]:
    called = entry.get("id")
    if not isinstance(called, str) or MARK not in called:
        raise ValueError(f"{called}: seeds need {MARK} in id, as in pythia-14m-seed{MARK}")
    plain = {key: value for key, value in entry.items() if key != KEY}
    below = {key: value for key, value in plain.items() if key in ("source", "revision", "checkpoints")}
    if MARK not in str(below):
        raise ValueError(f"{called}: no {MARK} in source, revision or checkpoints, so that all seeds are one model")
    return [{key: _put(value, seed) for key, value in plain.items()} for seed in _seeds(entry[KEY], called)]


def _seeds(told: Any, called: str) -> list[int]:
    """The seeds that an entry lists."""
    if isinstance(told, dict) and set(told) == {"first", "last"} and all(type(n) is int for n in told.values()):
        told = list(range(told["first"], min(told["last"], told["first"] + _MOST) + 1))
    fine = isinstance(told, list) and told and all(type(seed) is int and seed >= 0 for seed in told)
    if not fine or len(set(told)) != len(told) or len(told) > _MOST:
        raise ValueError(f"{called}: seeds {told!r} are neither a list of different numbers nor first and last")
    return told  # type: ignore[no-any-return]


def _put(value: Any, seed: int) -> Any:
    """`value` with a seed in the place of `{seed}`, wherever that stands."""
    if isinstance(value, str):
        return value.replace(MARK, str(seed))
    if isinstance(value, dict):
        return {key: _put(each, seed) for key, each in value.items()}
    return [_put(each, seed) for each in value] if isinstance(value, list) else value


def _suite(suite: Any, of: dict[str, list[str]]) -> Any:
    """A suite that names every model of a series where it names the series."""
    if not isinstance(suite, dict) or not isinstance(suite.get("models"), list):
        return suite
    models: list[Any] = []
    for each in suite["models"]:
        named = each.get("model") if isinstance(each, dict) else each
        ids = of.get(named, [named]) if isinstance(named, str) else [named]
        models += [each | {"model": one} if isinstance(each, dict) else one for one in ids]
    return suite | {"models": models}
