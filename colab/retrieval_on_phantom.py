# %% [markdown]
# # Tiles that find their like in other patients, on the phantom
#
# Gildenblat & Klaiman (arXiv 1905.08139) train on nothing but place: tiles that lie close together on a slide are
# alike, tiles far apart are not. They measure two things: does a tile find tiles of its kind, and how much farther
# apart are the descriptors of far tiles than those of near ones (ADDR)? Features of ImageNet and of a generic
# self-supervised method are below theirs in both.
#
# Here both are measured on slides whose truth is known, against an encoder that has learnt nothing, statistics of
# colour, MoCo v2, and SimCLR whose second view is a near tile: the modern form of the same idea (arXiv 2503.05170). A
# tile asks in other cases only, for ADDR by itself rewards whatever changes slowly along a slide, stain for one.
#
# Encoders are trained on cases that are in no figure. Nothing here is evidence about real tissue.
#
#     python colab/retrieval_on_phantom.py --out evidence/retrieval --size small        # two CPU cores
#     python colab/retrieval_on_phantom.py --out evidence/retrieval --size full         # an accelerator and 16 cores
#
# Run again, it goes on where it stopped. `mil_on_phantom.py` shares the slides and the runs.

# %%
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # many runs share one accelerator

from mfl_jax.demo import claims, evidence
from mfl_jax.demo.arms import Arm
from mfl_jax.evaluators import Task

work = evidence.options("Retrieval across cases, on the phantom.", "evidence/retrieval")

# %% [markdown]
# ## The slides

# %%
tileset = evidence.cohort(work)
counts = {name: len(cases) for name, cases in tileset.splits.items()}
evidence.tell(f"{len(tileset):,} tiles of {len(tileset.slides)} slides; cases: {counts}")

# %% [markdown]
# ## The encoders
#
# All have the same network, steps and batch, and see the same tiles. Near is within 64 um, far beyond 200 um, on the
# same slide, so that stain tells neither from the other.

# %%
NEAR, FAR = 64.0, 200.0
ARMS = (
    Arm("moco", "MoCo v2", "baseline", "two views of every H&E tile, against a queue", "moco:"),
    Arm(
        "near",
        "SimCLR, near tiles",
        "baseline",
        "a tile and one near it",
        f"two_view:info_nce,near,data.near_um={NEAR}",
    ),
    Arm(
        "siamese", "Siamese", "ours", "near tiles alike, far ones not", f"siamese:data.near_um={NEAR},data.far_um={FAR}"
    ),
)
runs = evidence.train(work, tileset, ARMS)

# %% [markdown]
# ## Features of the other cases
#
# The siamese network is asked twice: by the descriptor it was trained with, and by the encoder below it.

# %%
found = evidence.features(work, tileset, runs, ARMS, baselines=("random", "colour"))
descriptor = evidence.features(work, tileset, {"siamese": runs["siamese"]}, ARMS, feature="descriptor")
arms = [evidence.named(descriptor.arms[0], "descriptor", "Siamese, descriptor"), *found.arms]

# %% [markdown]
# ## Retrieval and distances
#
# *Tissue*: the commonest region under the tile, of eight. *Lesion*: only tiles of the rare region ask, as the paper's
# tumour tiles do, and all tiles may answer.

# %%
LESION = 8  # the region's number in regions.json, beside the slides
tasks = [Task("tissue", "region", exclude=(0,)), Task("lesion", "region", LESION - 0.5, exclude=(0,), asking=1)]
OURS, OTHERS = ("descriptor", "siamese"), ("random", "colour", "moco", "near")
pairs = [(a, b) for a in OURS for b in OTHERS]
results = evidence.judge_tiles(work, tileset, found, arms, tasks, pairs, limits=(NEAR, FAR))

# %% [markdown]
# ## What came out

# %%
lines = [claims.ahead(results, f"{task.name}/retrieval/map", OURS, OTHERS) for task in tasks]
lines.append(claims.ranked(results, "addr/local", "Far over near, slide by slide"))
for line in lines:
    evidence.tell(line)

# %%
words = {
    "title": "Tiles that find their like in other patients, on the phantom",
    "question": "Does learning from place alone find tiles of a kind in other patients?",
    "answer": " ".join(lines),
}
path = evidence.save(work, tileset, [results], runs, found, words)
evidence.tell(f"Open {path}; all figures are in {work.out / 'results.json'}.")
