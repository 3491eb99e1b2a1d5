import shutil

import pytest

from input_pipeline import cohort


def write(folder, text, name="cohort.csv"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_row_becomes_a_slide_with_partners_labels_and_paths_beside_the_csv(tmp_path):
    path = write(
        tmp_path,
        "slide_id,case_id,he,mpp_he,partner_if,mpp_if,kind_if,partner_rna,transform_rna,label,label_grade,note\n"
        "s1,c1,he/s1.svs,0.25,if/s1.tif,0.5,map,rna/s1.csv,t/s1.json,tumour,3,seen\n"
        "s2,c1,he/s2.svs,,,,,,,,,\n",
    )
    first, second = cohort.read(path)
    assert (first.slide_id, first.case_id, first.he, first.mpp) == ("s1", "c1", tmp_path / "he/s1.svs", 0.25)
    assert first.partners == (
        cohort.Partner("if", tmp_path / "if/s1.tif", "map", 0.5),
        cohort.Partner("rna", tmp_path / "rna/s1.csv", "vector", None, tmp_path / "t/s1.json"),
    )
    assert first.labels == {"label": "tumour", "label_grade": "3"}
    assert second.partners == ()
    assert second.mpp is None
    assert cohort.Slide.from_json(first.to_json()) == first
    said = []
    cohort.read(path, say=said.append)
    assert said == [f"{path}: columns without effect: note"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,he\na,b\n", r"lacks the columns \['case_id'\]"),
        ("slide_id,case_id,he\n", "names no slides"),
        ("slide_id,case_id,he\ns,c,a\nS,c,b\n", "twice"),
        ("slide_id,case_id,he\n../s,c,a\n", "refused"),
        ("slide_id,case_id,he\ns,c,\n", "row 2: he, the path"),
        ("slide_id,case_id,he,mpp_he\ns,c,a,20x\n", "a number above 0, not '20x'"),
        ("slide_id,case_id,he,mpp_he\ns,c,a,-1\n", "a number above 0, not '-1'"),
        ("slide_id,case_id,he,mpp_he\ns,c,a,nan\n", "a number above 0, not 'nan'"),
        ("slide_id,case_id,he,lable\ns,c,a,1\n", "column 'lable' has no meaning; is it 'label'"),
        ("slide_id,case_id,he,Label\ns,c,a,1\n", "is it 'label'"),
        ("slide_id,case_id,he,patner_if\ns,c,a,b\n", "is it 'partner_if'"),
        ("slide_id,case_id,he,mpp\ns,c,a,1\n", "is it 'mpp_he'"),
        ("slide_id,case_id,he,label_Grade\ns,c,a,1\n", "lower case letters"),
        ("slide_id,case_id,he,label\ns,c,a\n", "row 2: 3 fields"),
        ("slide_id,case_id,he\ns,c,a,b\n", "row 2: 4 fields"),
        ("slide_id,case_id,he,he\ns,c,a,b\n", "two columns are called 'he'"),
        ("slide_id,case_id,he\ns,P1,a\nt,p1,b\n", "'P1' and 'p1' differ in nothing but"),
        ("slide_id,case_id,he\ns,Mu\u0308,a\nt,M\u00fc,b\n", "differ in nothing but"),
        ("slide_id,case_id,he,mpp_if\ns,c,a,1\n", "no column partner_if"),
        ("slide_id,case_id,he,partner_if,kind_if\ns,c,a,b,picture\n", "allowed: image, map, vector"),
        ("slide_id,case_id,he,partner_IF\ns,c,a,b\n", "lower case"),
        ("slide_id,case_id,he,partner_he\ns,c,a,b\n", "format uses itself"),
    ],
)
def test_a_wrong_table_is_refused_and_says_where(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        cohort.read(write(tmp_path, text))


def test_a_folder_is_read_by_file_stem_and_tcga_patients_are_cases(tmp_path):
    for name in (
        "he/TCGA-AA-0001-01Z-00-DX1.svs",
        "he/TCGA-AA-0001-01Z-00-DX2.svs",
        "if/TCGA-AA-0001-01Z-00-DX1.ome.tif",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    first, second = cohort.read(tmp_path)
    assert first.case_id == second.case_id == "TCGA-AA-0001"
    assert [p.name for p in first.partners] == ["if"]
    assert second.partners == ()
    assert {s.case_id for s in cohort.read(tmp_path, case_pattern=r"(DX\d)")} == {"DX1", "DX2"}
    with pytest.raises(ValueError, match="finds no case"):
        cohort.read(tmp_path, case_pattern=r"(patient\d)")


@pytest.mark.parametrize(("pattern", "message"), [("(", "no regular expression"), ("TCGA", "one group")])
def test_a_case_pattern_that_is_none_is_refused(tmp_path, pattern, message):
    with pytest.raises(ValueError, match=message):
        cohort.read(tmp_path, case_pattern=pattern)


def test_a_slide_given_for_a_cohort_is_told_so(tmp_path):
    path = tmp_path / "a.svs"
    path.write_bytes(b"II*\x00\xff\xd8\xff\xe0" * 1000)
    with pytest.raises(ValueError, match=r"not text in UTF-8 \(is it a slide"):
        cohort.read(path)


def test_hidden_files_and_results_in_the_folder_are_no_slides(tmp_path):
    for name in (
        "HE/a.svs",
        "HE/._a.svs",
        "CD3/a.tif",
        "CD3/._a.tif",
        "tiled/status.csv",
        "tiled/cohort.json",
        "packed/manifest.json",
        "packed/picture.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (slide,) = cohort.read(tmp_path)
    assert (slide.he, slide.partners) == (
        tmp_path / "HE/a.svs",
        (cohort.Partner("cd3", tmp_path / "CD3/a.tif", "image"),),
    )


def test_two_folders_of_one_name_are_refused(tmp_path):
    for name in ("he", "if", "IF"):
        (tmp_path / name).mkdir(exist_ok=True)
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system does not tell lower case from upper case")
    with pytest.raises(ValueError, match="same partner 'if'"):
        cohort.read(tmp_path)


def test_a_partner_without_its_slide_is_not_passed_over(tmp_path):
    for name in ("he/a.svs", "if/b.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="1 partner files have no H&E"):
        cohort.read(tmp_path)


def test_the_signature_follows_row_parameters_and_files(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"one")
    slide = cohort.Slide("a", "c", tmp_path / "a.svs")
    before = slide.signature({"size": 256})
    assert before == slide.signature({"size": 256})
    assert before != slide.signature({"size": 224})
    assert before != cohort.Slide("a", "d", slide.he).signature({"size": 256})
    (tmp_path / "a.svs").write_bytes(b"three")
    assert before != slide.signature({"size": 256})


def test_the_signature_does_not_follow_the_place(tmp_path):
    def slide(folder):
        partner = cohort.Partner("if", folder / "a.tif", "image", None, folder / "a.json")
        return cohort.Slide("a", "c", folder / "a.svs", partners=(partner,), cells=folder / "a.csv")

    for name in ("a.svs", "a.tif", "a.json", "a.csv", "b.tif"):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / name).write_text(name)
    before = slide(tmp_path / "old").signature({})
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = slide(tmp_path / "new")
    assert moved.signature({}) == before
    renamed = cohort.Partner("if", tmp_path / "new" / "b.tif", "image", None, tmp_path / "new" / "a.json")
    assert cohort.Slide("a", "c", moved.he, partners=(renamed,), cells=moved.cells).signature({}) != before
