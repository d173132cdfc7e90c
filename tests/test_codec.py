"""The codec: whatever goes in comes out, and whatever is not a message raises one error."""

import collections
import enum
import math
import struct
import subprocess
import sys
import textwrap
import zlib

import interpreters
import numpy as np
import pytest
from faces import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wire import codec
from wire.codec import CodecError, decode, encode

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="?"),
    hnp.byte_string_dtypes(min_len=1, max_len=9),
    hnp.unicode_string_dtypes(endianness="?", min_len=1, max_len=9),
    hnp.datetime64_dtypes(endianness="?"),
    hnp.timedelta64_dtypes(endianness="?"),
    st.just(np.dtype(np.longdouble)),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
ARRAYS = hnp.arrays(DTYPES, SHAPES)
SCALARS = hnp.arrays(DTYPES, ()).map(lambda array: array[()])
KEYS = st.one_of(st.text(), st.integers(), st.binary(), st.booleans(), st.tuples(st.text(), st.integers()))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(), ARRAYS, SCALARS
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(KEYS, inner, max_size=5),
        st.dictionaries(st.text(), inner, max_size=5),
        st.sets(KEYS, max_size=5),
        st.frozensets(KEYS, max_size=5),
    ),
    max_leaves=12,
)


def same(left, right):
    """Equal in value and in type all the way down, NaN and the sign of zero included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(a, c) and same(b, d) for (a, b), (c, d) in zip(left.items(), right.items(), strict=True)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, (np.ndarray, np.generic)):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (left == right and repr(left) == repr(right))
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    return left == right


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_every_value_comes_back_the_same(value):
    assert same(decode(encode(value)), value)


@settings(max_examples=200, deadline=None)
@given(ARRAYS)
def test_every_array_comes_back_the_same_writable_and_owning_its_memory(array):
    back = decode(encode(array))
    assert same(back, array)
    assert back.flags.owndata
    assert back.flags.writeable
    assert back.flags.aligned


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=2, max_dims=3, max_side=5)))
def test_the_order_in_memory_does_not_matter(array):
    for view in (np.asfortranarray(array), array.T, array[::2], array[..., ::-1], array[:, 1:]):
        assert same(decode(encode(view)), view)


SOME_MESSAGES = [
    encode((np.arange(30, dtype="f4"), 1.5, False, True, {"a": [1, "b", None], 3: b"bytes"})),
    encode({"image": np.zeros((3, 4), "u1"), "when": np.datetime64("2020-01-01"), "n": 2**80}),
    encode([]),
]


@pytest.mark.parametrize("message", SOME_MESSAGES)
def test_a_message_cut_anywhere_is_refused(message):
    for end in range(len(message)):
        with pytest.raises(CodecError):
            decode(message[:end])


@pytest.mark.parametrize("message", SOME_MESSAGES)
def test_a_flipped_bit_anywhere_is_refused(message):
    for position in range(len(message) * 8):
        changed = bytearray(message)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(CodecError):
            decode(bytes(changed))


@pytest.mark.parametrize("message", SOME_MESSAGES)
@pytest.mark.parametrize("tail", [b"\0", b"more", bytes(1000)])
def test_bytes_after_the_end_are_refused(message, tail):
    with pytest.raises(CodecError):
        decode(message + tail)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_raise_the_one_error(data):
    with pytest.raises(CodecError):
        decode(data)


def signed(header, buffers=b"", length=None):
    """A message whose checksum is right, whatever is in it."""
    rest = struct.pack("<I", len(header) if length is None else length) + header + buffers
    return codec.MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


def decode_or_refuse(data):
    """Decodes; the one error is fine, any other is not."""
    try:
        return decode(data)
    except CodecError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SOME_MESSAGES), st.data())
def test_a_changed_message_with_a_right_checksum_raises_nothing_else(message, data):
    rest = bytearray(message[8:])
    for _ in range(data.draw(st.integers(1, 4))):
        rest[data.draw(st.integers(0, len(rest) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse(codec.MAGIC + struct.pack("<I", zlib.crc32(rest)) + bytes(rest))


JSON = st.recursive(
    st.one_of(
        st.sampled_from(["a", "n", "t", "l", "d", "s", "f", "b", "i", "c", "nu", "nb", "<f4", "|u1", "<U3", "|S2"]),
        st.integers(-3, 5),
        st.integers(),
        st.none(),
        st.booleans(),
        st.floats(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.binary(max_size=64))
def test_any_header_with_a_right_checksum_raises_nothing_else(tree, buffers):
    import json

    decode_or_refuse(signed(json.dumps(tree).encode("ascii"), buffers))


HOSTILE = {
    "a shape whose product overflows": signed(b'["a","<f8",4294967296,4294967296]', bytes(64)),
    "a shape larger than the message": signed(b'["a","<f8",1000000000]', bytes(64)),
    "a huge shape with nothing behind it": signed(b'["a","<f8",1000000000000]'),
    "no dimension and nothing behind it": signed(b'["a","<f8"]'),
    "a negative dimension": signed(b'["a","<f8",-1]', bytes(64)),
    "two negative dimensions": signed(b'["a","<f8",-2,-4]', bytes(64)),
    "a fraction as dimension": signed(b'["a","<f8",1.5]', bytes(64)),
    "a list as dimension": signed(b'["a","<f8",["l"]]', bytes(64)),
    "a thousand dimensions": signed(b'["a","<f8"' + b",1" * 1000 + b"]", bytes(8)),
    "Python objects": signed(b'["a","|O",1]', bytes(8)),
    "a scalar of Python objects": signed(b'["n","|O"]', bytes(8)),
    "fields": signed(b'["a","i4,i4",1]', bytes(8)),
    "no dtype": signed(b'["a","nonsense",1]', bytes(8)),
    "a dtype without size": signed(b'["a","|S0",5]', bytes(8)),
    "a dtype of huge size": signed(b'["a","|S999999999",1]', bytes(8)),
    "a dtype that is no text": signed(b'["a",["l"],1]', bytes(8)),
    "text that is no text": signed(b'["a","<U1",1]', b"\xff\xff\xff\xff"),
    "deep nesting of lists": signed(b'["l",' * 100_000 + b"1" + b"]" * 100_000),
    "nesting over the limit": signed(b'["l",' * 101 + b"1" + b"]" * 101),
    "deep nesting of dicts": signed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "an open bracket": signed(b'["l"'),
    "many open brackets": signed(b"[" * 1_000_000),
    "a number of a million digits": signed(b"1" * 1_000_000),
    "a hex number of no digits": signed(b'["i",""]'),
    "a hex number that is none": signed(b'["i","0x__________________"]'),
    "a short number in hex": signed(b'["i","1f"]'),
    "an unknown mark": signed(b'["zz",1]'),
    "no mark": signed(b"[]"),
    "a list as mark": signed(b"[[1],2]"),
    "a key without value": signed(b'["d",1]'),
    "a list as key": signed(b'["d",["l"],1]'),
    "a list in a set": signed(b'["s",["l"]]'),
    "more bytes than there are": signed(b'["b",65]', bytes(64)),
    "bytes after the last buffer": signed(b'["b",1]', b"xy"),
    "bytes and no buffer": signed(b"1", b"x"),
    "fewer than no bytes": signed(b'["b",-1]'),
    "true bytes": signed(b'["b",true]', b"x"),
    "two headers": signed(b"1 2"),
    "an empty header": signed(b""),
    "not ASCII": signed(b'"\xe9"'),
    "a header longer than the message": signed(b"1", length=0xFFFFFFFF),
    "a complex of texts": signed(b'["c","1","2"]'),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_message_with_a_right_checksum_is_refused(data):
    with pytest.raises(CodecError):
        decode(data)


@pytest.mark.parametrize("data", [None, 3, "text", [], b""])
def test_what_is_not_bytes_is_refused(data):
    with pytest.raises(CodecError):
        decode(data)


def test_a_huge_shape_allocates_nothing():
    import tracemalloc

    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        for header in (b'["a","<f8",100000000]', b'["n","|S900000000"]', b'["b",900000000]'):
            with pytest.raises(CodecError):
                decode(signed(header, bytes(8)))
        assert tracemalloc.get_traced_memory()[1] - before < 1_000_000
    finally:
        if not tracing:
            tracemalloc.stop()


def test_what_can_be_nested_can_be_read_again():
    value = 1
    for _ in range(codec.MAX_DEPTH):
        value = [value]
    assert decode(encode(value)) == value
    with pytest.raises(CodecError, match="nested more than"):
        encode([value])
    with pytest.raises(CodecError, match="nested more than"):
        encode({"deep": value})


def test_a_value_that_contains_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(CodecError, match="containing itself"):
        encode(value)


class Thing:
    def __repr__(self):
        return "<thing>"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (Thing(), ""),
        ({"a": [1, 2, Thing()]}, "['a'][2]"),
        ((1, {"b": {3: Thing()}}), "[1]['b'][3]"),
        ({"o": np.array([None])}, "['o']"),
        ([np.zeros(2, [("x", "i4"), ("y", "f8")])], "[0]"),
        ([np.zeros(1, [("x", "i4")])[0]], "[0]"),
        ([np.ma.masked_array([1, 2], [True, False])], "[0]"),
        ([bytearray(b"x")], "[0]"),
    ],
)
def test_what_cannot_be_sent_is_named_with_its_path(value, path):
    with pytest.raises(CodecError) as caught:
        encode(value)
    assert caught.value.path == path
    assert f"value{path}: no way to send a" in str(caught.value)


def test_default_stands_in_for_what_cannot_be_sent():
    sent = encode({"a": [1, Thing()], "b": np.array([None])}, default=lambda obj: f"no {type(obj).__name__}")
    assert decode(sent) == {"a": [1, "no Thing"], "b": "no ndarray"}


def test_a_default_that_gives_back_its_argument_comes_to_an_end():
    with pytest.raises(CodecError, match="never came to an end"):
        encode(Thing(), default=lambda obj: obj)


def test_subclasses_arrive_as_their_base():
    Point = collections.namedtuple("Point", "x y")
    Color = enum.IntEnum("Color", "RED")
    Name = enum.Enum("Name", {"A": "its value"}, type=str)
    value = [Point(1, 2), Color.RED, collections.OrderedDict(b=1, a=2), np.zeros(2).view(np.recarray), Name.A]
    back = decode(encode(value))
    assert [type(part) for part in back] == [tuple, int, dict, np.ndarray, str]
    assert list(back[2]) == ["b", "a"]
    assert back[4] == "its value"


@pytest.mark.parametrize("value", [np.str_("end\0"), np.bytes_(b"end\0"), np.str_(""), np.bytes_(b"")])
def test_numpy_texts_keep_the_zeros_at_their_end(value):
    back = decode(encode(value))
    assert type(back) is type(value)
    assert back == value


def test_the_slow_way_to_json_writes_the_same():
    tree = ["t", {"a": 0.1, "b": [None, True]}, float("inf"), "\u00e9\U0001f600"]
    assert codec._dumps(tree) == codec._encoder_of_json.encode(tree)


ECHO = """
    import sys
    sys.path.insert(0, %r)
    import codec
    stdin, stdout = (getattr(stream, "buffer", stream) for stream in (sys.stdin, sys.stdout))
    stdout.write(codec.encode(codec.decode(stdin.read())))
"""


@pytest.mark.parametrize("version", interpreters.VERSIONS)
def test_a_value_survives_the_way_through_another_python(version):
    value = {
        "obs": (np.arange(6, dtype=">f4").reshape(2, 3), np.float16(0.5), np.array("text"), np.zeros((0, 3))),
        "numbers": [0.1, -0.0, float("inf"), 2**200, -(2**63), 1j, True, None],
        "texts": ["plain", "caf\u00e9 \U0001f600", b"\xff\x00"],
        "when": [np.datetime64("2020-01-01T00:00"), np.timedelta64(3, "us"), np.array(["NaT"], "M8[D]")],
        1: {"set": {1, 2}, (1, "two"): frozenset(["x"])},
        "z": 1,
        "a": 2,
    }
    done = subprocess.run(
        [interpreters.python_with_numpy(version), "-c", textwrap.dedent(ECHO) % str(ROOT / "wire")],
        input=encode(value),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert same(decode(done.stdout), value)


def test_the_codec_needs_numpy_and_nothing_else():
    code = "import sys; before = set(sys.modules); import numpy; import wire.codec; print(set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert not any(name in done.stdout for name in ("gymnasium", "Pyro4", "farmhand", "tensorflow", "pickle5"))


# Floats by their uppermost bytes.


def test_of_every_exponent_it_is_known_whether_a_float_is_surely_finite():
    bits = np.arange(1 << 16, dtype="<u4") << 16  # each sign, exponent and beginning of a mantissa
    for number in bits.view("<f4"):
        surely = codec.surely_finite(np.array([1.0, number, 0.0], "<f4").tobytes())
        assert surely <= np.isfinite(number)
        assert surely == (abs(number) < 2.0**127)  # 1.7e38; False of NaN


def test_of_no_floats_all_are_finite():
    assert codec.surely_finite(b"")
