from headrace.align.corpus import texts


def test_the_parts_share_no_text_and_both_hold_prose_and_code():
    calibration, held_out = texts("calibration"), texts("held_out")
    assert not set(calibration) & set(held_out)
    for part in (calibration, held_out):
        assert sum(map(len, part)) > 150_000
        assert any("def __init__(self" in text for text in part)
        assert any("*****" in text and "def __init__" not in text for text in part)


def test_it_is_the_same_each_time():
    assert texts("held_out") == texts("held_out")
