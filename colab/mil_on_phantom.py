# %% [markdown]
# # Slides from bags of tiles, on the phantom
#
# Dehaene et al. (arXiv 2012.03583) train an encoder without labels on tiles of the slides themselves, freeze it, and
# let a small head read a slide as a bag of tile features. They claim two things:
#
# 1. features learnt in the domain lift every head, the simplest too;
# 2. the best head on them comes close to a tile classifier that was told where the tumour is.
#
# Here both are put to slides whose truth is known, with baselines, three seeds of every encoder, intervals over cases
# and paired differences. There are two tasks. A *lesion* is a focus of 60 um on a slide a thousand um wide or less: a
# few tiles of many, as in Camelyon. The *subtype* is in the arrangement of nests and immune cells, all over the slide.
#
# Encoders are trained on cases that are in no figure; heads are trained and tested in nested folds of the other cases.
# That is inductive, and stricter than the paper. Nothing here is evidence about real tissue.
#
#     python colab/mil_on_phantom.py --out evidence/mil --size small        # two CPU cores
#     python colab/mil_on_phantom.py --out evidence/mil --size full         # an accelerator and 16 cores
#
# Run again, it goes on where it stopped. `retrieval_on_phantom.py` shares the slides and the runs.

# %%
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # many runs share one accelerator

from mfl_jax.demo import claims, evidence
from mfl_jax.demo.arms import LABELLED, Arm
from mfl_jax.evaluators import Task

work = evidence.options("Slide-level heads on many encoders, on the phantom.", "evidence/mil")

# %% [markdown]
# ## The slides
#
# H&E of every case. Cases that encoders are trained on have immunofluorescence as well, which MFL learns from.

# %%
tileset = evidence.cohort(work)
counts = {name: len(cases) for name, cases in tileset.splits.items()}
evidence.tell(f"{len(tileset):,} tiles of {len(tileset.slides)} slides; cases: {counts}")

# %% [markdown]
# ## The encoders
#
# All but the ceiling have the same network, steps, batch and tiles. *Marker* is supervision by another task: which
# tiles are mostly marker-positive, which says nothing about lesions or subtypes.
#
# *Told where* is the ceiling of the first task: the same network trained on which tiles lie in a lesion, each kind of
# region being shown as often. A lesion is a few tiles of a slide, too few of the paired cases to learn it from; so the
# ceiling has slides of other cases, and more steps.

# %%
LESION = 8  # the region's number in regions.json, beside the slides
WHERE = f'supervised.target=region,supervised.threshold={LESION - 0.5},data.columns=("region",),data.balance=region'
ARMS = (
    Arm("marker", "Marker, supervised", "baseline", "labels of another task, the marker", f"supervised:{LABELLED}"),
    Arm("simclr", "SimCLR", "ours", "two views of every H&E tile", "two_view:info_nce"),
    Arm("moco", "MoCo v2", "ours", "two views of every H&E tile, against a queue", "moco:"),
    Arm("mfl", "MFL", "ours", "H&E, and the marker's channel of immunofluorescence", "mfl:if,info_nce"),
)
CEILING = Arm("where", "Told where", "ceiling", "which tiles lie in a lesion", f"supervised:{WHERE}")
runs = evidence.train(work, tileset, ARMS)
more_slides = evidence.annotated(work)
runs |= evidence.train(work, more_slides, [CEILING], f"total.steps={work.scale.annotated_steps},optim.lr=2e-3")

# %% [markdown]
# ## Features of the other cases
#
# Beside the trained encoders there are the same network as it was drawn, and statistics of colour. *Told kinds* has no
# encoder: the features of a tile say its kind, and whether it holds others, from the phantom's own map. Where heads
# fail on these as well, it is slides or heads that are wanting; where they do not, it is encoders.

# %%
found = evidence.features(
    work, tileset, runs, (*ARMS, CEILING), baselines=("random", "colour"), tasks=[Task("tile", "region", LESION - 0.5)]
)

# %% [markdown]
# ## Heads
#
# MeanPool, Chowder and DeepMIL on each of them, one fit for every inner fold; a slide's prediction is the mean of the
# fits that have not seen its case. The ceiling takes the mean of its three greatest tile scores, and has no head.

# %%
HEADS = ("meanpool", "chowder", "deepmil")
SSL, OTHERS = ("simclr", "moco", "mfl"), ("random", "colour", "marker")
results, judged = [], {}
for task in ("lesion", "subtype"):
    table = evidence.slide_table(work, tileset, "label_lesion" if task == "lesion" else "label")
    encoders = evidence.told_kinds(evidence.without(found, "where"))
    arms = evidence.slide_arms(work, encoders, table, task, HEADS)
    pairs = [(f"{a}/{head}", f"{b}/{head}") for head in HEADS for a in SSL for b in OTHERS]
    if task == "lesion":
        arms.append(evidence.ceiling(found, "where", "tile", table, task, top=3))
        pairs += [(f"{a}/{head}", "where/top3") for head in HEADS for a in SSL]
    judged[task] = evidence.judge_slides(work, tileset, table, task, arms, pairs)
    results.append(judged[task])

# %% [markdown]
# ## What came out
#
# The two claims, as they stand here. A claim about every head holds where the best unlabelled encoder of the domain is
# above the random one with every head, after Holm's correction. The second holds where the whole interval of the best
# head's difference to the ceiling lies above -0.02; where only its middle does, it is neither shown nor refuted.

# %%
lines = [claims.lifted(judged[task], task, HEADS, ("simclr", "moco"), "random") for task in judged]
lines += [claims.reached(judged[task], task, HEADS, "told") for task in judged]
lines.append(claims.near_ceiling(judged["lesion"], "lesion", HEADS, SSL, "where/top3", within=0.02))
for line in lines:
    evidence.tell(line)

# %%
words = {
    "title": "Slides from bags of tiles, on the phantom",
    "question": "Do features learnt without labels lift every slide-level head, up to strong supervision?",
    "answer": " ".join(lines),
}
others = {"Slides of the ceiling": more_slides}
path = evidence.save(work, tileset, results, runs, found, words, others)
evidence.tell(f"Open {path}; all figures are in {work.out / 'results.json'}.")
