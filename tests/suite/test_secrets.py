"""What is printed or stored holds no secret, wherever one is written: in a URL, a header, an option, a setting."""

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.suite.secrets import scrubbed, without_secrets

# Z does not occur in what is around it, so that any rest of a secret shows.
PLAIN = st.text("Z0123456789", min_size=6, max_size=24)
ODD = st.text("Z0123456789 '\"&;=?#/$", min_size=6, max_size=24).filter(lambda text: text.count("Z") > 1)
NAMES = st.sampled_from(["token", "hf_token", "api-key", "AWS_SECRET_ACCESS_KEY", "password", "sig", "X-Amz-Signature"])
HOSTS = st.sampled_from(["host", "host:8080", "bucket.s3.example.com"])
TOKENS = st.one_of(
    st.text("Z0123456789", min_size=16, max_size=40).map("hf_{}".format),
    st.text("Z0123456789", min_size=12, max_size=20).map("AKIA{}".format),
)
AROUND = st.sampled_from(["{}", "cannot open {}: no such file", "'{}'", "({})", "tried {} twice", "{}\nbecause"])
both = pytest.mark.parametrize("cleaned", [scrubbed, without_secrets])


@st.composite
def urls(draw):
    """(a URL with secrets in it, what of it must stay)"""
    scheme, host = draw(st.sampled_from(["https", "s3", "ftp"])), draw(HOSTS)
    user = draw(st.sampled_from(["{0}@", "me:{0}@", "{0}:{0}@", ""])).format(draw(PLAIN))
    query = draw(st.sampled_from(["", "?{name}={0}", "?x=1&{name}={0}", "?{name}={0}&x=1"]))
    query = query.format(draw(PLAIN), name=draw(NAMES))
    return f"{scheme}://{user}{host}/a/b{query}", f"{host}/a/b"


@both
@settings(deadline=None)
@given(url=urls(), around=AROUND)
def test_no_secret_of_a_url_is_left_and_the_place_is_still_named(cleaned, url, around):
    text, kept = url
    clean = cleaned(around.format(text))
    assert "Z" not in clean
    assert not any(digits in clean for digits in _runs(text, kept))
    assert kept in clean
    assert cleaned(clean) == clean


@both
@settings(deadline=None)
@given(token=TOKENS, around=AROUND)
def test_tokens_of_the_hub_and_of_aws_are_known_by_their_form(cleaned, token, around):
    assert token not in cleaned(around.format(token))
    assert cleaned(around.format(token)) == around.format("***")


@both
@settings(deadline=None)
@given(
    secret=PLAIN,
    header=st.sampled_from(
        ["Authorization: Bearer {}", "authorization: Basic {}", "'Authorization': 'Bearer {}'", "Cookie: {}",
         '"x-amz-security-token": "{}"', "X-Auth-Token: {}", "Bearer {}", "Proxy-Authorization: {}"]
    ),
    around=AROUND,
)  # fmt: skip
def test_headers_are_told_without_their_credentials(cleaned, secret, header, around):
    clean = cleaned(around.format(header.format(secret)))
    assert secret not in clean
    assert "***" in clean


@settings(deadline=None)
@given(
    secret=st.one_of(PLAIN, ODD),
    name=NAMES,
    form=st.sampled_from([["--{name}", "{0}"], ["--{name}={0}"], ["{name}={0}"], ["env", "{name}={0}", "x"]]),
)
def test_a_command_is_kept_without_the_secrets_that_it_was_given(secret, name, form):
    words = ["deadbench", "run", *(word.format(secret, name=name) for word in form), "--out", "out"]
    clean = without_secrets(shlex.join(words))
    assert "Z" not in clean
    assert clean.startswith("deadbench run ")
    assert clean.endswith(" --out out")
    assert shlex.split(clean)[-2:] == ["--out", "out"], "what is left is still a command"


@both
@pytest.mark.parametrize(
    "text",
    [
        "models.yaml: the key 'a' is given twice", "no tokenizer in https://host/m", "the authorization failed",
        "input 'tokens:random' needs --tokens 5", "s3://bucket/a/b: no such file", "config.json: key: not a number",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(cleaned, text):
    assert cleaned(text) == text


def _runs(text, kept):
    """The long runs of digits of `text` that are not in `kept`."""
    found = "".join(letter if letter.isdigit() else " " for letter in text.replace(kept, "")).split()
    return [run for run in found if len(run) > 5]
