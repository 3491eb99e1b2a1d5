"""SLPD"""

from ml_collections import ConfigDict

from configs import common, dino_tiles


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, ("breast", "argmax", "vit", "resnet"), "slpd")
    config = dino_tiles.get_config(",".join(given - {"breast", "argmax"}))
    config.name = config.method = "slpd"
    config.slpd = slpd(given)
    return config


def slpd(given: set[str]) -> ConfigDict:
    """The options of the method."""
    k, least, start, every = (2, 16, "20 epochs", "1 epochs") if "breast" in given else (4, 32, "20 epochs", "1 epochs")
    if "tiny" in given:
        k, least, start, every = 2, 4, "2 steps", "2 steps"
    return ConfigDict(
        {
            "k": k,
            "min_regions": least,
            "iterations": 10,
            "restarts": 5,
            "start": start,
            "every": every,
            "neighbours": 1,
            "transfer": "argmax" if "argmax" in given else "matched",
            "intra": 1.0,
            "inter": 1.0,
            "centres": "own",
        }
    )
