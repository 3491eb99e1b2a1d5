# %% [markdown]
# # Prototypes of slides, on the phantom
#
# HIPT learns without labels on two levels: DINO on tiles, then DINO on regions, which are grids of tile features. SLPD
# (arXiv 2307.10696) adds two terms to the second level. The regions of a slide are clustered into a few prototypes; a
# region is drawn towards the prototype of its own cluster (intra), and towards the one that stands for it in the slide
# most like its own (inter). The claim: for telling slides apart SLPD is above DINO on regions, which is above the mean
# of tile features, and clearest with nothing fitted but the nearest neighbours.
#
# Here it is put to slides whose truth is known, with each term off and on, other numbers of prototypes and neighbours,
# heads that read tiles without regions, three seeds, intervals over cases and paired differences. The subtype is in how
# tumour nests and immune cells lie, not in how much there is of them; but wherever two kinds of tissue meet there are
# tiles that hold both, and these tell a mean of tiles of the arrangement as well: how much, the arms of *Truth* say.
# Nothing here is evidence about real tissue.
#
# Every figure is of one half of the cases, by folds of patients. *Inductive* arms were trained on the other half: one
# split, not one pre-training a fold. *Transductive* ones were trained on the tested half, without its labels, for as
# many steps, as the paper does. *Told kinds* asks what the second level can do by itself: it is trained as the
# inductive arms are, on tiles whose features are their kind, from the phantom's own map; the mean of these is the
# mixture.
#
#     python colab/slpd_on_phantom.py --out evidence/slpd --size small        # two CPU cores
#     python colab/slpd_on_phantom.py --out evidence/slpd --size full         # an accelerator and 16 cores
#
# Run again, it goes on where it stopped.

# %%
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # many runs share one accelerator

from mfl_jax import slide_level
from mfl_jax.demo import evidence, levels
from mfl_jax.demo.arms import Arm
from mfl_jax.evaluators import slide_study

work = evidence.options("Prototypes of slides, on the phantom.", "evidence/slpd")
scale = levels.LEVELS[work.name]

# %% [markdown]
# ## The slides

# %%
tileset = levels.cohort(work, scale)
counts = {name: len(cases) for name, cases in tileset.splits.items()}
evidence.tell(f"{len(tileset):,} tiles of {len(tileset.slides)} slides; cases: {counts}")
table = levels.slide_table(work, tileset)

# %% [markdown]
# ## Level 1: tiles
#
# One encoder for each half of the cases, and the features of every tile by both.

# %%
tile_runs = levels.train_tiles(work, scale)
folders = levels.features(work, tile_runs)

# %% [markdown]
# ## Level 2: regions
#
# Squares of neighbouring tiles, side by side or overlapping, kept where half of their cells hold tissue. All arms have
# the same network, crops, batch and steps.

# %%
OFF = "slpd.intra=0.0,slpd.inter=0.0"  # without its two terms SLPD is DINO
SLPD = "DINO on regions, and both terms: 4 prototypes a slide, 1 neighbour"
ARMS = (
    Arm("dino", "HIPT: DINO on regions", "baseline", "large and small crops of every region", f"slpd:{OFF}"),
    Arm("intra", "SLPD, intra alone", "ours", "DINO, and the prototypes of the own slide", "slpd:slpd.inter=0.0"),
    Arm("inter", "SLPD, inter alone", "ours", "DINO, and the prototypes of the neighbour", "slpd:slpd.intra=0.0"),
    Arm("slpd", "SLPD", "ours", SLPD, "slpd:"),
)
OTHERS = (
    Arm("slpd-k2", "SLPD, 2 prototypes", "ours", "2 prototypes a slide, 1 neighbour", "slpd:slpd.k=2"),
    Arm("slpd-n3", "SLPD, 3 neighbours", "ours", "4 prototypes a slide, 3 neighbours", "slpd:slpd.neighbours=3"),
    Arm("slpd-k2-n3", "SLPD, 2 and 3", "ours", "2 prototypes, 3 neighbours", "slpd:slpd.k=2,slpd.neighbours=3"),
)
arms = {"inductive": (*ARMS, *OTHERS), "transductive": (ARMS[0], ARMS[3]), levels.TOLD: ARMS}
sets = levels.regions(work, scale, folders | {levels.TOLD: levels.told_features(work)})
runs = levels.train_regions(work, scale, sets, arms)

# %% [markdown]
# ## Slides
#
# Nearest neighbours and a linear classifier on the mean of a slide, and HIPT's aggregator of all its regions; in its
# place the tiles have attention-based MIL (ABMIL, here DeepMIL) and CLAM-SB. Beside them stand what the phantom knows
# to be written on the slides, and statistics of colour.

# %%
brief = [*(arm.name for arm in OTHERS), *(f"{arm.name}-told" for arm in ARMS)]
regions, digests = levels.region_arms(runs, sets, arms, table, brief)
tiles = levels.tile_arms(scale, folders, tile_runs, table)
every = [*regions, *tiles, levels.colour_arm(work, table), *levels.truth_arms(work, table)]
PAIRS = [  # p values are corrected for all of them together
    *levels.CLAIM, ("slpd", "mean"), ("intra", "dino"), ("inter", "dino"),
    ("slpd", "intra"), ("slpd", "inter"), ("slpd", "abmil"), ("slpd", "clam"), ("dino", "abmil"), ("mean", "colour"),
    ("slpd-k2", "slpd"), ("slpd-n3", "slpd"), ("slpd-k2-n3", "slpd"),
    ("slpd-told", "mixture"),
    ("intra-told", "dino-told"), ("inter-told", "dino-told"),
    ("slpd-seen", "dino-seen"), ("dino-seen", "dino"), ("slpd-seen", "slpd"), ("mean-seen", "mean"),
    ("arrangement", "mixture"), ("purity", "mixture"),
]  # fmt: skip
options = {"folds": scale.folds, "epochs": scale.epochs, "resamples": scale.resamples, "pairs": PAIRS}
study = slide_study.study(every, table, transductive=True, **options, say=evidence.tell)

# %% [markdown]
# ## What came out

# %%
lines, fallen = [levels.written(study)], levels.collapsed(runs)
for way, title in (("knn", "Nearest neighbours"), ("linear", "Linear"), ("hipt", "Aggregator")):
    for share in study.draws:
        asked = levels.CLAIM if way != "hipt" else (("slpd", "dino"), ("dino", "abmil"))
        told = "; ".join(levels.compared(study, way, share, *pair) for pair in asked)
        lines.append(f"{title}, {share:.0%} of the labels: {told}.")
for line in (*lines, *fallen):
    evidence.tell(line)

# %%
words = {
    "title": "Prototypes of slides, on the phantom",
    "question": "Is SLPD above DINO on regions, and that above the mean of tile features, for telling slides apart?",
}
more = {
    "answer": levels.answer(study, fallen),
    "curves": levels.curves(runs),
    **levels.record(work, tileset, digests),
}
results, path = slide_level.write(work.out, study, **words, notes=[*fallen, *lines], more=more)
evidence.tell(f"Open {path}; all figures are in {work.out / 'results.json'}.")
