import numpy as np
import pytest

from input_pipeline.table import open_table, read_rows


def write(tmp_path, content, name="a.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_rows_keep_their_number_in_the_file(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbfa, b \r\n1,"x, y"\r\n\r\n,\r\n2, z\r\n')
    assert read_rows(path, ("b",)) == (["a", "b"], [(2, {"a": "1", "b": "x, y"}), (5, {"a": "2", "b": "z"})])


def test_a_tsv_is_separated_by_tabs(tmp_path):
    assert read_rows(write(tmp_path, "a\tb\n1,5\t2\n", "a.tsv"))[1] == [(2, {"a": "1,5", "b": "2"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", "row 3: 1 fields, the header has 2"),
        ("a,b\n1,2,3\n", "row 2: 3 fields"),
        ("a,b,a\n1,2,3\n", "two columns are called 'a'"),
        ("a,b,\n1,2,3\n", "column 3 has no name"),
        ("b\n1\n", r"lacks the columns \['a'\]; it has \['b'\]"),
        ("", r"lacks the columns \['a'\]"),
        ("a;b\n1;2\n", "separated by ';': save it with ','"),
        ('a,b\n1,"2\n', "row 2: not a row of a CSV"),
        ('a,b\n1,"2"x\n', "row 2: not a row of a CSV"),
        ("a,b\n1,\xe9\n".encode("latin-1"), "not text in UTF-8"),
        (np.random.default_rng(0).bytes(100_000), "not text in UTF-8|lacks"),
    ],
)
def test_what_is_no_table_is_refused_and_says_where(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path, ("a",))
    assert str(path) in str(caught.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="No such file"), open_table(tmp_path / "none.csv"):
        pass


def test_an_error_of_the_reader_of_rows_is_left_alone(tmp_path):
    with pytest.raises(KeyError, match="mine"), open_table(write(tmp_path, "a\n1\n")):
        raise KeyError("mine")
