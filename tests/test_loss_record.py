"""The record of the loss."""

from diffusers_scalelong.loss_record import LossRecord


def test_a_loss_record_continues_where_the_checkpoint_was(tmp_path):
    record = LossRecord(tmp_path / "loss.csv")
    for step in range(1, 6):
        record.append(step, step / 3, 1e-4)
    del record  # no close: as after a crash
    with (tmp_path / "loss.csv").open("a") as file:
        file.write("6,0.")  # half a line
    record = LossRecord(tmp_path / "loss.csv", last_step=3)
    record.append(4, 0.25, 1e-4)
    record.close()
    assert record.losses == [1 / 3, 2 / 3, 1.0, 0.25]
    assert (tmp_path / "loss.csv").read_text().splitlines()[-1] == "4,0.25,0.0001"


def test_an_interrupted_start_keeps_the_earlier_rows(tmp_path):
    record = LossRecord(tmp_path / "loss.csv")
    record.append(1, 0.5, 1e-4)
    record.close()
    (tmp_path / ".loss.csv.partial").write_text("step,lo")  # killed while it was rewritten
    assert LossRecord(tmp_path / "loss.csv", last_step=1).losses == [0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["loss.csv"]
