from protoclip_jax.evaluation.table import comparison_table

BEFORE = {"zero_shot/top1": 0.0623, "geometry/modality_gap": 0.8217, "clustering/ari": 0.002}
AFTER = {"zero_shot/top1": 12.3, "geometry/modality_gap": 0.51, "zero_shot_unseen/top1": 100.0}
CHANCE = {"zero_shot/top1": 0.0623, "clustering/ari": 0.0}


def test_columns_are_aligned_and_say_their_units():
    table = comparison_table({"untrained": BEFORE, "trained": AFTER}, CHANCE)
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["untrained", "trained", "chance"]
    row = next(line for line in lines if "unseen artist" in line)
    assert row.split()[-6:] == ["0.06", "%", "12.30", "%", "0.06", "%"]
    for title, cell in (("untrained", "0.06 %"), (" trained", "12.30 %")):
        assert lines[0].index(title) + len(title) == row.index(cell) + len(cell)
    gap = next(line for line in lines if "modality gap" in line)
    assert gap.split()[-3:] == ["0.822", "0.510", "-"]
    assert [line for line in lines if line[0] not in " -"] == [
        "Zero-shot classification", "Clusters against classes", "Geometry of the features",
    ]  # fmt: skip


def test_unknown_metrics_and_many_columns_still_fit():
    columns = {f"run {i}": {"my_room/a_metric_with_a_very_long_name_indeed": 1.0} for i in range(4)}
    table = comparison_table(columns)
    assert max(map(len, table.splitlines())) <= 80
    assert "a metric with" in table
    assert "chance" not in table
    assert comparison_table({}).strip("-\n") == ""
