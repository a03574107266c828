"""BTAD's folders: ok and ko, masks of either suffix."""

from pathlib import Path

from helpers.image_files import write_images, write_mask

from training.datasets.btad import load_btad
from training.datasets.samples import Sample


def test_images_labels_and_masks_of_either_suffix_are_found(tmp_path: Path) -> None:
    write_images(tmp_path / "01" / "train" / "ok", 12, ".bmp")
    write_images(tmp_path / "01" / "test" / "ok", 1, ".bmp")
    write_images(tmp_path / "01" / "test" / "ko", 2, ".bmp")
    masks = tmp_path / "01" / "ground_truth" / "ko"
    write_mask(masks / "000.png")
    write_mask(masks / "001.bmp")
    write_mask(masks / "007.png")
    (data,) = load_btad(tmp_path)
    ko = tmp_path / "01" / "test" / "ko"
    assert data.name == "01"
    assert len(data.train) == 12
    assert data.test == (
        Sample(ko / "000.bmp", anomalous=True, defect="ko", mask=masks / "000.png"),
        Sample(ko / "001.bmp", anomalous=True, defect="ko", mask=masks / "001.bmp"),
        Sample(tmp_path / "01" / "test" / "ok" / "000.bmp", anomalous=False, defect="good", mask=None),
    )
    assert data.orphan_masks == (masks / "007.png",)
