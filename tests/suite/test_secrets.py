"""What is shown holds no secret, wherever one is written: in a URL, a header, an option, a setting."""

import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.suite.secrets import scrubbed, shown_command, shown_place

# Z does not occur in what is around it, so that any rest of a secret shows.
PLAIN = st.text("Z0123456789", min_size=6, max_size=24)
ODD = st.text("Z01 '\"&;=?#$@[]<>\n\t%|\\", min_size=4, max_size=22).map("Z{}Z".format)
NAMES = st.sampled_from(["token", "hf_token", "api-key", "AWS_SECRET_ACCESS_KEY", "password", "sig", "X-Amz-Signature"])
SETTINGS = st.sampled_from(["t", "jwt", "pwd", "code", "token", "x"])
HOSTS = st.sampled_from(["host", "host:8080", "bucket.s3.example.com", "[::1]:8080", ""])
CHAINS = st.sampled_from(["", "simplecache::", "zip://inner.zip::", "filecache::blockcache::"])
TOKENS = st.one_of(
    st.text("Z0123456789", min_size=16, max_size=40).map("hf_{}".format),
    st.text("Z0123456789", min_size=12, max_size=20).map("AKIA{}".format),
    st.text("Z0123456789", min_size=16, max_size=40).map("ghp_{}".format),
    st.text("Z0123456789", min_size=8, max_size=40).map("eyJ{}.ZZZZ.Z".format),
)
AROUND = st.sampled_from(["{}", "cannot open {}: no such file", "'{}'", "({})", "tried {} twice", "{}\nbecause"])


@st.composite
def urls(draw, secrets):
    """(a URL with secrets in it, the same without)"""
    scheme, host, before = draw(st.sampled_from(["https", "s3", "ftp"])), draw(HOSTS), draw(CHAINS)
    user = draw(st.sampled_from(["Z{0}@", "me:Z{0}@", "Z{0}:Z{0}@", ""])).format(draw(secrets)) if host else ""
    rest = draw(st.sampled_from(["", "?{name}=Z{0}", "?x=1&{name}={0}", "?{name}={0}&x=1", "#{0}", ";v={1}/c?Z={0}"]))
    rest = rest.format(draw(secrets), draw(PLAIN), name=draw(SETTINGS))
    kept = f"{before}{scheme}://{host}/a/b"
    return f"{before}{scheme}://{user}{host}/a/b{rest}", kept + ("/c" if rest.startswith(";") else "")


@settings(deadline=None, derandomize=True)
@given(url=urls(PLAIN))
def test_of_a_place_the_scheme_host_and_path_are_kept_and_nothing_else(url):
    secret, kept = url
    assert shown_place(secret) == kept
    assert shown_place(kept) == kept


@settings(deadline=None, derandomize=True)
@given(url=urls(ODD))
def test_where_a_secret_breaks_its_url_the_place_is_not_guessed(url):
    secret, kept = url
    assert shown_place(secret) in (kept, f"{kept.rpartition('://')[0]}://***")


def test_by_hand():
    assert shown_place("https://me:p@ss wo'rd@host:8080/a?jwt=x#y") == "https://host:8080/a"
    assert shown_place("simplecache::s3://KEY[@bucket/a") == "simplecache::s3://***"


@settings(deadline=None, derandomize=True)
@given(secret=ODD.map("Z{}".format))
def test_a_password_that_breaks_its_url_is_not_shown_either(secret):
    assert shown_place(f"s3://u:Z{secret.replace('@', '/')}@bucket/a") == "s3://bucket/a"


@settings(deadline=None, derandomize=True)
@given(url=urls(PLAIN), around=AROUND)
def test_no_secret_of_a_url_is_left_in_words_and_the_place_is_still_named(url, around):
    text, kept = url
    clean = scrubbed(around.format(text))
    assert clean == around.format(kept)
    assert scrubbed(clean) == clean


@settings(deadline=None, derandomize=True)
@given(url=urls(PLAIN), around=AROUND)
def test_a_url_that_was_taken_for_a_path_is_one_still(url, around):
    assert "Z" not in scrubbed(around.format(Path(url[0])))


@settings(deadline=None, derandomize=True)
@given(
    scheme=st.sampled_from(["http:", "HTTP:", "s3:", "az:", "github:", "file:", "text:http:", ""]),
    slashes=st.sampled_from(["//", "///", "////", "\\\\\\\\", "/\\", "/", ""]),
    secret=PLAIN,
    around=AROUND,
)
def test_user_and_password_are_known_behind_whatever_slashes(scheme, slashes, secret, around):
    if not scheme:
        slashes = "//"
    elif not slashes and not scheme.lower().endswith("http:"):
        slashes = "/"  # else it may be a specification of ours, as in hf:name:split@revision
    misspelt = f"{scheme}{slashes}me:Z{secret}@host/a"
    assert "Z" not in scrubbed(around.format(misspelt))
    assert shown_place(misspelt) == f"{scheme}//host/a"


@settings(deadline=None, derandomize=True)
@given(secret=PLAIN, around=AROUND, before=st.sampled_from(["", "a/", "web/2020/"]))
def test_a_url_in_the_path_of_another_has_no_user_either(secret, around, before):
    inner = f"https://host/{before}http://me:Z{secret}@other/a"
    kept = f"https://host/{before}http://other/a"
    assert shown_place(inner) == kept
    assert scrubbed(around.format(inner)) == around.format(kept)


def test_a_path_that_was_a_url_by_hand():
    assert scrubbed("http:/me:Z000000@host/a?t=Z0: no such registry file") == "http://host/a: no such registry file"
    assert scrubbed("text:/data/corpus.txt, C:/data?x") == "text:/data/corpus.txt, C:/data?x"


@settings(deadline=None, derandomize=True)
@given(secret=st.one_of(PLAIN, ODD).map("Z1234567{}".format), around=AROUND)
def test_a_secret_of_a_place_is_known_wherever_a_library_quotes_it(secret, around):
    shown_place(f"s3://me:{secret}@host/a")
    assert "Z1234567" not in scrubbed(around.format(f"refused (key {secret})"))
    assert "Z1234567" not in scrubbed(around.format(repr(secret)))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("ftp://user:Aq7xPartOne#Bz9yPartTwo@host:99999/d", "Port could not be cast to integer value as 'Aq7xPartOne'"),
        ("ftp://user:Aq7xPartOne/Bz9yPartTwo@host/d", "no such host: Bz9yPartTwo"),
        ("zip://x.zip::http://host/auth=Aq7xPartOne\tBz9yPartTwo/m", "unsupported: Aq7xPartOne Bz9yPartTwo"),
    ],
)
def test_a_part_of_a_secret_that_a_library_took_for_something_else_is_known(place, words):
    shown_place(place)
    assert "Part" not in scrubbed(words).replace("Port", "")
    assert scrubbed("of the path: http://host/model=pythia-160m-deduped-v0/m").endswith(
        "/model=pythia-160m-deduped-v0/m"
    )


def test_a_key_of_the_environment_is_no_part_of_what_a_store_s_client_says(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    assert scrubbed("SignatureDoesNotMatch: wJalrXUtnFEMI/K7MDENG of x") == "SignatureDoesNotMatch: *** of x"


@settings(deadline=None, derandomize=True)
@given(
    secret=st.text("abcXYZ019+/=_-", min_size=4, max_size=40).map("Z{}".format),
    name=st.sampled_from(["key", "secret", "aws_secret_access_key", "AccountKey", "token", "AWSAccessKeyId", "sas"]),
    form=st.sampled_from(
        ["S3FileSystem({0}='{1}', anon=False)", "{{'{0}': '{1}'}}", '{{"{0}": "{1}"}}', "<{0}>{1}</{0}><X>no</X>",
         "refused: {0}={1}", "{0} = {1}", "DefaultEndpointsProtocol=https;{0}={1};EndpointSuffix=a"]
    ),
    around=AROUND,
)  # fmt: skip
def test_what_a_store_s_client_was_given_is_not_told(secret, name, form, around):
    told = form.format(name, secret)
    clean = scrubbed(around.format(told))
    assert secret not in clean
    assert "***" in clean


def test_what_a_store_s_client_was_given_by_hand():
    told = "<Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>GOOG1E</AWSAccessKeyId><StringToSign>a\nb</StringToSign>"
    assert scrubbed(told) == (
        "<Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>***</AWSAccessKeyId><StringToSign>***</StringToSign>"
    )


@settings(deadline=None, derandomize=True)
@given(token=TOKENS, around=AROUND)
def test_tokens_are_known_by_their_form(token, around):
    assert scrubbed(around.format(token)) == around.format("***")
    assert shown_place(f"https://host/a_{token}/b") == "https://host/a_***/b"
    assert shown_place(f"./models-{token}/b") == "./models-***/b"


def test_secrets_that_lie_over_each_other_are_one():
    shown_place("s3://u:abcdefgh@host/b")
    shown_place("s3://u:ghijklmnop@host/b")
    assert scrubbed("of hf_abcdefghijklmnopqr and abcdefghijklmnop, hf_0123456789abcdefg") == "of *** and ***, ***"
    assert scrubbed("abcdefghabcdefgh") == "******"


@settings(deadline=None, derandomize=True)
@given(
    secret=PLAIN,
    header=st.sampled_from(
        ["Authorization: Bearer {}", "authorization: Basic {}", "'Authorization': 'Bearer {}'", "Cookie: {}",
         '"x-amz-security-token": "{}"', "X-Auth-Token: {}", "Bearer {}", "Proxy-Authorization: {}"]
    ),
    around=AROUND,
)  # fmt: skip
def test_headers_are_told_without_their_credentials(secret, header, around):
    clean = scrubbed(around.format(header.format(secret)))
    assert secret not in clean
    assert "***" in clean


@settings(deadline=None, derandomize=True)
@given(
    secret=st.one_of(PLAIN, ODD),
    name=NAMES,
    form=st.sampled_from(
        [["--{name}", "{0}"], ["--{name}={0}"], ["{name}={0}"], ["env", "{name}={0}", "x"], ["https://Z{0}@host/a"],
         ["text:https://me:Z{0}@host/a"], ["--out=s3://bucket/a?Z{0}"]]
    ),
)  # fmt: skip
def test_a_command_is_kept_without_the_secrets_that_it_was_given(secret, name, form):
    words = ["deadbench", "run", *(word.format(secret, name=name) for word in form), "--out", "out"]
    clean = shown_command(words)
    assert "Z" not in clean
    shown = shlex.split(clean)
    assert (shown[:2], shown[-2:], len(shown)) == (words[:2], words[-2:], len(words)), "it is still a command"


@pytest.mark.parametrize(
    "text",
    [
        "models.yaml: the key 'a' is given twice", "no tokenizer in https://host/m", "the authorization failed",
        "sorted(key=None)", "num_key_value_heads = 12345", "the key 'pad_token_id': 50256", "4096 tokens: too many",
        "input 'tokens:random' needs --tokens 5", "s3://bucket/a/b: no such file", "config.json: key: not a number",
        "https://host/org/model@main: no such revision; give name@revision", "hf://org/name@v1: not there",
        "http://localhost:8080/a@b/c: refused", "https://***/a", "hf:name:split@revision: no such data",
        "s3://bucket/run:/a@main/b", "s3://bucket/day=2:/@x", "./models//gpt2", "C:\\models\\a@main", "file:///data/x",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert scrubbed(text) == text
    assert shown_place(text.partition(": ")[0]) == text.partition(": ")[0]


@pytest.mark.parametrize(
    "part", ["x", "-", "x.", "a://", "key=", "token", "http:", "//a:", "::", "a::", "'", "eyJ", "cookie: ", "a:// "]
)
def test_long_words_take_no_longer_than_their_length_asks(part):
    """With its square it would be an hour, and the limit of a test would end it."""
    text = part * (100_000 // len(part))
    assert scrubbed(text)
    assert shown_place(text)
