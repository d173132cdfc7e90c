"""farmlist.py: what is taken, and how a mistake in it is explained."""

import pathlib

import pytest

from farmer.farmlist import PORT, FarmAddress, load_farmlist
from wire.errors import FarmlistError

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def written(tmp_path):
    """Writes a farmlist.py; returns its path."""

    def write(text, encoding="utf-8"):
        path = tmp_path / "farmlist.py"
        path.write_bytes(text.encode(encoding))
        return path

    return write


def refused(source):
    with pytest.raises(FarmlistError) as caught:
        load_farmlist(source)
    return str(caught.value)


def test_a_list_of_the_documented_form_is_read(written):
    path = written("farmlist_base = [('127.0.0.1', 4), ('192.168.1.33:20100', 8)]\n")
    expected = [FarmAddress("127.0.0.1", PORT, 4), FarmAddress("192.168.1.33", 20100, 8)]
    assert load_farmlist(path) == expected
    assert load_farmlist(str(path)) == expected


def test_the_example_that_ships_is_a_good_list():
    assert [farm.slots for farm in load_farmlist(ROOT / "farmlist.example.py")] == [4, 8]


def test_pairs_may_be_given_without_a_file():
    assert load_farmlist([("slave", 2)]) == [FarmAddress("slave", PORT, 2)]
    assert load_farmlist(iter([["slave:1", 2]]))[0].port == 1


@pytest.mark.parametrize(
    ("address", "host", "port", "text"),
    [
        ("slave.example", "slave.example", PORT, f"slave.example:{PORT}"),
        (" 10.0.0.1:7 ", "10.0.0.1", 7, "10.0.0.1:7"),
        ("::1", "::1", PORT, f"[::1]:{PORT}"),
        ("[::1]", "::1", PORT, f"[::1]:{PORT}"),
        ("[fe80::2]:65535", "fe80::2", 65535, "[fe80::2]:65535"),
    ],
)
def test_an_address_is_a_name_or_a_number_with_or_without_a_port(address, host, port, text):
    (farm,) = load_farmlist([(address, 3)])
    assert (farm.host, farm.port, farm.slots) == (host, port, 3)
    assert str(farm) == text


def test_a_list_may_be_computed(written):
    path = written("farmlist_base = [('10.0.0.%d' % n, 2) for n in range(1, 4)]\n")
    assert [farm.host for farm in load_farmlist(path)] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


def test_a_missing_file_says_where_it_was_looked_for_and_what_to_put_there(tmp_path):
    text = refused(tmp_path / "farmlist.py")
    assert str(tmp_path / "farmlist.py") in text
    assert "farmlist.example.py" in text
    assert "farmlist_base = [(" in text


def test_a_directory_is_no_farmlist(tmp_path):
    assert "cannot read" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("# farms\nfarmlist_base = [('a', 4)\n         ('b', 2]\n", 3, "does not match"),
        ("farmlist_base = [('a', 4)]\nfarmlist_base = [\n", 2, "never closed"),
        ("import math\nfarmlist_base = [('a', four)]\n", 2, "four"),
        ("\nimport no_such_module_at_all\n", 2, "no_such_module_at_all"),
        ("farmlist_base = [\n    ('a', 4),\n    ('b', 'two'),\n]\n", 3, "'two'"),
        ("farmlist_base = [\n    ('a', 4),\n    ('a:20099', 2),\n]\n", 3, "twice"),
        ("farmlist_base = [\n    ('a', 4),\n    'b',\n]\n", 3, "no pair"),
        ("farmlist_base = []\n", 1, "at least one"),
        ("\n\nfarmlist_base = ('a', 4)\n", 3, "no pair"),
        ("farmlist_base = {'a': 4}\n", 1, "must be a list"),
        ("farmlist_base: list = [\n  ('a', 4),\n  ('b', 0)]\n", 3, "1 or more"),
    ],
)
def test_a_mistake_is_told_with_its_file_and_line(written, text, line, words):
    path = written(text)
    said = refused(path)
    assert f"{path}, line {line}" in said
    assert words in said


@pytest.mark.parametrize("entry", [("a", 0), ("a", -1), ("a", 2.0), ("a", True), ("a", None), ("a", "4")])
def test_a_wrong_number_of_slots_is_refused_with_its_value(entry):
    assert repr(entry[1]) in refused([entry])


@pytest.mark.parametrize(
    "address",
    [
        "",
        " ",
        None,
        4,
        "a:",
        "a:b",
        "a:0",
        "a:65536",
        "a:-1",
        ":20099",
        "a b",
        "http://a",
        "me@a",
        "[::1",
        "[::1]x",
        "a:²",
    ],
)
def test_what_is_no_address_is_refused_with_its_value(address):
    text = refused([(address, 1)])
    assert repr(address) in text or repr(str(address).strip()) in text


def test_an_entry_of_a_list_in_memory_is_told_by_its_place():
    assert "farmlist, entry 2" in refused([("a", 1), ("b", 0)])


def test_a_file_without_the_name_says_which_is_wanted(written):
    assert "does not define farmlist_base" in refused(written("farmlist = [('a', 1)]\n"))


def test_bytes_that_are_no_text_are_a_farmlist_error(written):
    assert "cannot read" in refused(written("farmlist_base = [('\u00e9', 1)]", "latin-1"))


def test_a_zero_byte_is_a_farmlist_error(written):
    refused(written("farmlist_base = [('a', 1)]\0"))


def test_a_list_that_leaves_the_program_is_a_farmlist_error(written):
    assert "line 2" in refused(written("import sys\nsys.exit(3)\n"))


def test_what_can_not_be_iterated_over_is_a_farmlist_error():
    assert "must be a list" in refused(None)


@pytest.mark.parametrize(
    ("address", "ssh", "port"),
    [
        ("ssh://gpu7", "gpu7", 20099),
        ("ssh://user@gpu7", "user@gpu7", 20099),
        ("ssh://user@gpu7:2222", "user@gpu7:2222", 20099),
        ("ssh://user@gpu7:2222/20100", "user@gpu7:2222", 20100),
        ("ssh://user@gpu7/20100", "user@gpu7", 20100),
        ("ssh://first.last@[fe80::1]:22", "first.last@[fe80::1]:22", 20099),
        (" ssh://192.168.1.33 ", "192.168.1.33", 20099),
    ],
)
def test_an_ssh_address_is_a_login_and_maybe_the_farms_port(address, ssh, port):
    (farm,) = load_farmlist([(address, 3)])
    assert (farm.host, farm.port, farm.slots, farm.ssh) == ("127.0.0.1", port, 3, ssh)
    assert load_farmlist([(str(farm), 3)]) == [farm]


@pytest.mark.parametrize(
    "address",
    [
        "ssh://",
        "ssh://-oProxyCommand=touch",
        "ssh://user@-oProxyCommand=touch",
        "ssh://-l@host",
        "ssh://a b",
        "ssh://host;touch",
        "ssh://host$(touch)",
        "ssh://host:0",
        "ssh://host:99999",
        "ssh://host:x",
        "ssh://host/",
        "ssh://host/x",
        "ssh://host/0",
        "ssh://host/1/2",
        "ssh://user:password@host",
        "ssh://ho\u0301st",
    ],
)
def test_what_is_no_ssh_address_is_refused(address):
    with pytest.raises(FarmlistError, match="is no address\n  wanted: 'ssh://user@host'"):
        load_farmlist([(address, 1)])


def test_the_same_farm_behind_two_machines_is_two_farms_and_behind_one_is_one():
    assert len(load_farmlist([("ssh://a", 1), ("ssh://b", 1), ("127.0.0.1", 1)])) == 3
    with pytest.raises(FarmlistError, match="ssh://a is there twice"):
        load_farmlist([("ssh://a", 1), ("ssh://a/20099", 2)])
