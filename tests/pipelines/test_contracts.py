from models.spec import SPECS
from pipelines.data.contracts import FEATURES


def test_lengths_and_widths_follow_the_spec() -> None:
    shapes = {name: FEATURES.schema(SPECS[name]).field("latent_mean").type.shape for name in ("tiny", "16k", "44k")}
    assert shapes == {"tiny": [40, 160], "16k": [250, 20], "44k": [345, 40]}
    sixteen = FEATURES.schema(SPECS["16k"])
    assert sixteen.field("clip_features").type.shape == [64, 1024]
    assert sixteen.field("sync_features").type.shape == [192, 768]
    assert sixteen.field("text_features").type.shape == [77, 1024]
