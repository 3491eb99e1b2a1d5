"""SLPD (arXiv 2307.10696): DINO on regions, drawn towards prototypes of their slide and of the slide most like it.

    mfl train --config=configs/slpd.py:phantom --workdir=runs/slpd          # regions of the phantom
    mfl train --config=configs/slpd.py --workdir=runs/slpd                  # the paper's setting, on your own regions
    mfl prototypes runs/slpd --tileset data/regions --out prototypes        # what it found in each slide

''            configs/dino_regions.py, and from epoch 21 on, before every epoch, 4 prototypes of each slide with at
              least 32 regions (paper, lung). Time not yet measured.
phantom, gpu  as there; prototypes after a fifth of the steps, and then some ten times. gpu: not yet run.
tiny          two steps of almost nothing, for tests.
Words         lung, breast: breast is 2 prototypes of each slide with at least 16 regions (paper, BRCA); matched,
              argmax: with argmax a prototype stands for whichever of the neighbour's is most alike, as in the released
              code, not for the one it is matched with; drop, turn: as there.
Expect        paper: better than HIPT, whose test AUC at 100 % of the slides is .874 (BRCA) and .952 (lung). Here, on
              a phantom of 48 cases, 150 steps, three seeds: KNN of slides .831 on tiles that say their kind (DINO .800,
              the mean .428), and at chance on features of DINO; colab/slpd_on_phantom.py.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common, dino_regions

COHORTS, TRANSFER = ("lung", "breast"), ("matched", "argmax")


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, (*COHORTS, *TRANSFER, "drop", "turn"), "slpd")
    config = dino_regions.get_config(",".join(sorted(given - {*COHORTS, *TRANSFER})))
    config.name, config.method = "slpd", "slpd"
    config.slpd = slpd(given)
    if "tiny" in given:
        config.encoder, config.views.local = "grid_vit,features=16,blocks=1,heads=2", ""  # compiles fast
    return config


def slpd(given: set[str]) -> ConfigDict:
    """The options of the method."""
    k, least = {"lung": (4, 32), "breast": (2, 16)}[common.one_of(given, COHORTS, "cohort")]
    options = {
        "k": k,  # prototypes of a slide
        "min_regions": least,  # of a slide, to have any
        "iterations": 10,
        "restarts": 5,
        "start": "20 epochs",  # done before prototypes are sought
        "every": "1 epochs",
        "neighbours": 1,
        "apart": "slide",  # "case": of other patients alone
        "transfer": common.one_of(given, TRANSFER, "transfer"),
        "intra": 1.0,  # weights of the two terms beside DINO's
        "inter": 1.0,
        "centres": "own",
    }
    if "tiny" in given:
        options |= {"k": 2, "min_regions": 8, "start": "1 steps", "every": "16 steps"}
    elif "phantom" in given:
        options |= {"min_regions": 8, "start": "20%", "every": "8%"}
    elif "gpu" in given:
        options |= {"start": "20%", "every": "8%"}
    return ConfigDict(options)


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: each term off and on, prototypes, neighbours and whose, transfer."""
    for seed in range(3):
        for intra, inter in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
            yield f"slpd.intra={intra},slpd.inter={inter},seed={seed}"
        for k in (2, 8):
            yield f"slpd.k={k},seed={seed}"
        yield f"slpd.neighbours=3,seed={seed}"
        yield f"slpd.apart=case,seed={seed}"
        yield f"argmax,seed={seed}"
        yield f"slpd.centres=shared,seed={seed}"
