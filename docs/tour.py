# %% [markdown]
# # How a vision-language model answers
#
# This tour follows one picture and one prompt through PaliGemma: picture, patches, SigLIP, projector, prefix,
# and then one token at a time, until the answer is a box around a red circle. Each cell calls the functions
# of the NumPy reference in [`reference/`](../reference). It holds the formulas of the papers, in float64.
#
# The model is the demo that comes with the package. It knows drawn circles, squares, triangles and stars. The
# published PaliGemma has the same parts and formulas in larger sizes. PaliGemma 2 adds a few to its decoder:
# more norms, limits on scores and logits, and layers that see only the nearest tokens.
#
# To run it yourself: `pip install -e '.[tour]'` in a checkout, and open this notebook with that Python.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np

from paligemma import demo, load_hf_model, reference
from paligemma.answers.drawing import draw
from paligemma.compare import compare, recording
from paligemma.images import open_image
from paligemma.processor import Processor
from paligemma.reference import gemma, layers, siglip
from paligemma.reference.model import embed, embed_image, hidden_states, make_attn_mask, output_head

plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 9})
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#e69f00", "#009e73", "#cc79a7"  # distinct to colour-blind readers too

model = reference.load(demo.CHECKPOINT)
processor = Processor.load(demo.CHECKPOINT)
config, p = model.config, model.params
vision, text = config.vision_config, config.text_config

parameters = sum(math.prod(tensor.shape) for tensor in p.stored.values())
print(f"{parameters / 1e6:.1f} million parameters")
print(f"vision tower: {vision.num_hidden_layers} layers, width {vision.hidden_size}")
print(f"decoder: {text.num_hidden_layers} layers, width {text.hidden_size}, {text.vocab_size} tokens")

# %% [markdown]
# ## The picture
#
# The processor resizes the picture to a square, here of 112 pixels, whatever its shape was. It maps the
# brightness 0 to 255 of each colour to -1 to 1. The result is `pixel_values`: one image, three colours, rows,
# columns. The vision tower will cut it into patches of 14 pixels, so there are 8 rows of 8 patches.

# %%
image = open_image(demo.SAMPLES / "shapes.png")
inputs = processor.arrays("detect red circle", image)
pixels = inputs["pixel_values"]
side = vision.image_size // vision.patch_size
assert (vision.image_size, vision.patch_size, side, vision.num_patches) == (112, 14, 8, 64)
assert -1 <= pixels.min() <= pixels.max() <= 1
print("pixel_values", pixels.shape, "from a picture of", image.size)

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.6))
left.imshow(image)
left.set(title="the picture", xlabel="x, pixels", ylabel="y, pixels")
right.imshow((pixels[0].transpose(1, 2, 0) + 1) / 2)
edges = np.arange(0, vision.image_size + 1, vision.patch_size)
right.set(title="what the model sees, and its patches", xlabel="x, pixels", ylabel="y, pixels")
right.set(xticks=edges - 0.5, yticks=edges - 0.5, xticklabels=edges, yticklabels=edges)
right.grid(color="black", linewidth=0.6)
plt.show()

# %% [markdown]
# ## The prompt
#
# The model reads one row of token ids. It begins with one `<image>` token for each patch. These hold places:
# the image takes them later. Then come `<bos>`, the prompt, and a newline, which tells the model that the
# prompt ends here.

# %%
input_ids = inputs["input_ids"]
names = [processor.tokenizer.piece(i) for i in input_ids[0]]
assert names[:64] == ["<image>"] * 64
T = len(names)
print(f"{T} tokens: 64 x <image>, then {names[64:]}")
print("ids of the text:", input_ids[0, 64:].tolist())

# %% [markdown]
# SentencePiece, the tokenizer, writes a space as `▁`. A word with the space before it is one token.
#
# ## From pixels to patches
#
# The 14 x 14 pixels of a patch, in three colours, are 588 numbers. One matrix maps them to a vector of the
# width of the tower: the patch embedding. Then the position embedding of the patch is added. It is a learned
# vector for each of the 64 places. Without it the tower could not know where a patch is, because attention
# treats the patches as a set. The cell computes one patch by hand: the one in row 1 and column 2, both
# counted from 0.

# %%
tower = p / "vision_tower" / "vision_model"  # `/` goes one level down in the names of the checkpoint
conv, places = tower / "embeddings" / "patch_embedding", tower / "embeddings" / "position_embedding"
patch = pixels[0, :, 14:28, 28:42].ravel()
by_hand = conv["weight"].reshape(vision.hidden_size, -1) @ patch + conv["bias"] + places["weight"][1 * 8 + 2]

x = siglip.embeddings(pixels, tower / "embeddings", vision)
assert len(patch) == 588
assert np.allclose(x[0, 1 * 8 + 2], by_hand)
print("embeddings of the patches", x.shape)

figure, plots = plt.subplots(1, 3, figsize=(7, 2.6))
unit = places["weight"] / np.linalg.norm(places["weight"], axis=1, keepdims=True)
for axes, (row, column) in zip(plots, [(0, 0), (3, 4), (6, 1)], strict=True):
    similarity = (unit @ unit[row * side + column]).reshape(side, side)
    shown = axes.imshow(similarity, cmap="cividis", vmin=-1, vmax=1)
    axes.plot(column, row, "x", color="black")
    axes.set(title=f"row {row}, column {column}", xlabel="column", ylabel="row")
figure.colorbar(shown, ax=plots, label="cosine similarity")
figure.suptitle("How similar the position embedding of the patch at the cross is to the others")
plt.show()

# %% [markdown]
# The embedding of a place is most similar to those of its neighbours, so the embeddings do tell which patches
# are near each other.
#
# ## SigLIP
#
# The vision tower is a transformer encoder with the architecture of SigLIP. (SigLIP is also a way of
# training: the published tower first learned to give a picture and its caption similar vectors. The demo's
# tower first learned which shape each patch shows.) Each layer does two things, and adds each result to its
# input (the residual):
#
# - **attention** mixes the patches: each patch takes what it needs from all others;
# - the **MLP** then computes on each patch alone: a matrix, GELU (a smooth step that passes positive numbers
#   and hardly any negative ones), and a second matrix.
#
# A LayerNorm comes before each of the two, and one more after the last layer.

# %%
for i in range(vision.num_hidden_layers):
    x = siglip.encoder_layer(x, tower / "encoder" / "layers" / i, vision)
x = layers.layer_norm(x, tower / "post_layernorm", vision.layer_norm_eps)
assert np.allclose(x, siglip.vision_model(pixels, tower, vision))
print("the patches after the tower", x.shape)

# %% [markdown]
# Attention has several heads. In each of them a patch has a query q, a key k and a value v, three projections
# of its vector. The weights of a patch are `softmax(q k / sqrt(D))`, where q is its own query, k are the keys
# of all patches, and D is the length of a key. They sum to 1. The head returns the mean of all values with
# these weights.
#
# `forward` stores every intermediate result in `record`. From these we compute the weights.

# %%
record = {}
first_logits = model.forward(**inputs, record=record)


def vision_weights(layer):  # -> (H, P, P): heads, patches that look, patches that are looked at
    name, shape = f"vision_tower.vision_model.encoder.layers.{layer}.self_attn", (64, -1, vision.head_dim)
    q, k, v = (record[f"{name}.{part}_proj"][0].reshape(shape) for part in "qkv")
    weights = layers.softmax(np.einsum("phd,shd->hps", q, k) / math.sqrt(vision.head_dim))
    values = np.einsum("hps,shd->phd", weights, v).reshape(64, -1)
    assert np.allclose(values, record[f"{name}.out_proj.input"][0])  # what the reference computed
    return weights


weights = vision_weights(0)
print("weights (heads, patches that look, patches that are looked at)", weights.shape)
assert np.allclose(weights.sum(axis=-1), 1)

# %% [markdown]
# We draw the weights of one patch in the middle of the green circle. Patches that get little weight are dark,
# and weights of at least 10 % are written into the patch.


# %%
def spotlight(axes, weights, title):  # weights (P,)
    axes.imshow(image, extent=(0, side, side, 0))
    dark = 0.85 * (1 - weights / weights.max()).reshape(side, side)
    axes.imshow(np.zeros((side, side)), cmap="gray", alpha=dark, extent=(0, side, side, 0))
    for n in np.flatnonzero(weights >= 0.1):
        colour = "white" if dark.flat[n] > 0.4 else "black"
        place = {"x": n % side + 0.5, "y": n // side + 0.5, "ha": "center", "va": "center"}
        axes.text(s=f"{100 * weights[n]:.0f}", color=colour, size=7, **place)
    axes.set(title=title, xticks=[], yticks=[])


row, column = 5, 4
here = row * side + column
first, last = vision_weights(0)[:, here], vision_weights(vision.num_hidden_layers - 1)[:, here]  # (H, P)
figure, plots = plt.subplots(2, vision.num_attention_heads, figsize=(8, 4.4))
for head in range(vision.num_attention_heads):
    spotlight(plots[0, head], first[head], f"first layer, head {head}")
    spotlight(plots[1, head], last[head], f"last layer, head {head}")
for axes in plots.flat:
    axes.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="white"))
figure.suptitle("Attention of the framed patch over the picture, %")
plt.show()

is_green = (pixels[0, 1] > 0.5) & (pixels[0, 2] < 0)
circle = is_green.reshape(side, 14, side, 14).mean(axis=(1, 3)).ravel() > 0.5
print(f"{circle.sum()} patches are mostly of the circle; the patch gives them this share of its attention:")
shares = [weights[:, circle].sum(axis=1).mean() for weights in (first, last)]
print(f"{shares[0]:.2f} in the first layer, {shares[1]:.2f} in the last")
print(f"the largest single weight: {first.max():.2f} in the first layer, {last.max():.2f} in the last")
assert circle[here]
assert min(shares) > 0.5
assert last.max() > 0.5 > first.max()

# %% [markdown]
# The patch looks mostly at the circle of which it is a part. The heads differ: some look at the whole circle,
# one in the last layer mostly at a single patch of its outline, and one around it.
#
# ## The projector
#
# A single matrix with a bias maps each patch from the width of the tower to the width of the decoder. In the
# demo both are 128. The results are the image tokens.

# %%
image_tokens = layers.linear(x, p / "multi_modal_projector" / "linear")
assert np.allclose(image_tokens, embed_image(pixels, p, config))
assert vision.hidden_size == text.hidden_size == 128
print("image tokens", image_tokens.shape)

# %% [markdown]
# ## The prefix
#
# Each text token is a row of the embedding table, multiplied by the square root of the width, as Gemma was
# trained. The image tokens are not multiplied. They take the places of `<image>`. From here on the decoder
# sees one sequence of vectors, and handles those that were pixels in the same way as those that were letters.

# %%
everything = np.ones_like(input_ids, bool)  # no padding
prefix = embed(input_ids, everything, image_tokens, p, config)
table = (p / "language_model" / "model" / "embed_tokens")["weight"]
assert np.array_equal(prefix[:, :64], image_tokens)
assert np.array_equal(prefix[0, 64:], table[input_ids[0, 64:]] * math.sqrt(128))
print("prefix", prefix.shape)

# %% [markdown]
# ## Who sees whom
#
# Image and prompt are given, so nothing has to be hidden among them: every token of the prefix sees the whole
# prefix. The answer is written from left to right. Each of its tokens sees the prefix, the answer before it
# and itself. This is prefix-LM attention. The cell takes the answer that we shall get below.

# %%
answer = "<loc0128><loc0252><loc0342><loc0463> red circle"
with_answer = processor.arrays("detect red circle", image, suffix=answer)
is_answer = with_answer["token_type_ids"]
mask = make_attn_mask(np.ones_like(is_answer, bool), is_answer)
assert mask[0, :T, :T].all()
assert not mask[0, :T, T:].any()
assert np.array_equal(mask[0, T:, T:], np.tri(is_answer.sum(), dtype=bool))

start = 60  # the image tokens before it are left out of the plot: they see and are seen like the others
shown = [processor.tokenizer.piece(i) for i in with_answer["input_ids"][0, start:]]
figure, axes = plt.subplots(figsize=(5, 4.6))
axes.imshow(mask[0, start:, start:], cmap="cividis")
axes.set(title="Prefix-LM attention (bright: sees)", xlabel="token that is seen", ylabel="token that sees")
axes.set_xticks(range(len(shown)), [name.replace("\n", "newline") for name in shown], rotation=90)
axes.set_yticks(range(len(shown)), [name.replace("\n", "newline") for name in shown])
for place in (64 - start - 0.5, T - start - 0.5):  # where the prompt begins, and where the answer does
    axes.axhline(place, color="black", linewidth=0.8)
    axes.axvline(place, color="black", linewidth=0.8)
plt.show()

# %% [markdown]
# ## Where a token is: RoPE
#
# The decoder has no position embedding. Instead, rotary position embedding (RoPE) turns queries and keys. Two
# features of a vector are a point in a plane, which is turned by an angle that grows with the position of the
# token; each pair of features has its own speed. A score is the product of a query and a key, and when both
# are turned by the same angle it does not change. So a score depends on how far apart two tokens are, and not
# on where they are.

# %%
query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, text.head_dim))  # B, T, H, D


def score(query_at, key_at):
    turned = layers.rope(query, np.array([[query_at]]), text.rope_theta)
    return (turned * layers.rope(key, np.array([[key_at]]), text.rope_theta)).sum()


print(f"distance  7: positions 10 and  3: {score(10, 3):.4f}, positions 60 and 53: {score(60, 53):.4f}")
print(f"distance 20: positions 23 and  3: {score(23, 3):.4f}, positions 73 and 53: {score(73, 53):.4f}")
assert math.isclose(score(10, 3), score(60, 53))
assert not math.isclose(score(10, 3), score(23, 3))

# %% [markdown]
# ## A layer of the decoder
#
# A layer of Gemma has the same two parts as one of SigLIP, with three differences:
#
# - **RMSNorm** divides a vector by its root mean square; unlike LayerNorm it does not subtract the mean.
# - **Multi-query attention**: all heads share one key and one value for each token (in PaliGemma 2, groups of
#   heads do). There is less to remember while the answer is written, as we shall see.
# - **GeGLU**: the MLP has two matrices that widen the vector. The result of one, the gate, goes through GELU
#   and is multiplied by the result of the other. So the gate decides how much of each feature passes.
#
# `record` lets us check each of these.

# %%
name = "language_model.model.layers.0"
residual = record[f"{name}.post_attention_layernorm.input"]  # the tokens after attention
weight = (p / name / "post_attention_layernorm")["weight"]
rms = np.sqrt((residual**2).mean(axis=-1, keepdims=True) + text.rms_norm_eps)
normed = residual / rms * (1 + weight)  # Gemma stores the weight minus 1
assert np.allclose(normed, record[f"{name}.post_attention_layernorm"])

gate, up = record[f"{name}.mlp.gate_proj"], record[f"{name}.mlp.up_proj"]
assert np.allclose(layers.gelu_tanh(gate) * up, record[f"{name}.mlp.down_proj.input"])
assert text.num_key_value_heads == 1
print("queries", record[f"{name}.self_attn.q_rope"].shape, "  keys", record[f"{name}.self_attn.k_rope"].shape)
print("GeGLU widens each token from", normed.shape[-1], "to", gate.shape[-1], "features")

# %% [markdown]
# ## The next token
#
# After the layers there is one more norm. Then the vector of the last token is multiplied by the embedding of
# each token of the vocabulary. These products are the logits: the larger the logit, the likelier that token
# comes next. `softmax` makes probabilities of them.

# %%
hidden = hidden_states(prefix, everything, np.zeros_like(input_ids), p, config)
assert np.allclose(gemma.lm_head(hidden, output_head(p), text), first_logits)
assert np.allclose(hidden[0, -1] @ table.T, first_logits[0, -1])
probabilities = layers.softmax(first_logits[0, -1])
for i in np.argsort(-probabilities)[:5]:
    print(f"{processor.tokenizer.piece(int(i))}  {probabilities[i]:.3f}")

# %% [markdown]
# The first token of the answer is the place of the upper edge of the box. Neighbouring places are nearly as
# likely.
#
# ## A token at a time
#
# We take the most probable token, add it to the row as the first of the answer, and compute again. This goes
# on until the model says `<eos>`. (With a temperature, the next token is drawn by its probability instead.
# For boxes, the most probable one is best.)

# %%
ids, kinds, steps = input_ids, np.zeros_like(input_ids), []  # kinds: 0 for the prefix, 1 for the answer
while not (steps and ids[0, -1] in config.eos_token_ids):
    steps.append(model.forward(ids, pixels, token_type_ids=kinds)[0, -1])
    token = int(steps[-1].argmax())
    print(f"{processor.tokenizer.piece(token):10}  probability {layers.softmax(steps[-1])[token]:.3f}")
    ids, kinds = np.append(ids, [[token]], axis=1), np.append(kinds, [[1]], axis=1)

new = ids[:, T:]
assert np.array_equal(new, model.generate(**inputs))
assert processor.tokenizer.decode(new) == answer
print(answer)

# %% [markdown]
# ## Location tokens
#
# PaliGemma writes boxes as text: the vocabulary has 1024 tokens from `<loc0000>` to `<loc1023>`, and four of
# them are the edges of a box, in the order y0, x0, y1, x1 (top, left, bottom, right). The side of the picture
# is divided into 1024 bins, whatever its size. Here are the logits of all location tokens in the four steps
# that wrote the box.

# %%
loc = [processor.tokenizer.encode(f"<loc{n:04}>") for n in range(1024)]
assert all(len(one) == 1 for one in loc)
assert len(processor.tokenizer.encode("<loc1024>")) > 1
loc = np.ravel(loc)

edges, colours = ("y0, top", "x0, left", "y1, bottom", "x1, right"), (BLUE, ORANGE, GREEN, PINK)
chosen = [int(np.flatnonzero(loc == i)[0]) for i in new[0, :4]]
figure, plots = plt.subplots(4, 1, figsize=(7, 5.6), sharex=True, sharey=True)
for axes, edge, logits, place, colour in zip(plots, edges, steps[:4], chosen, colours, strict=True):
    axes.plot(logits[loc], color=colour, linewidth=1)
    axes.axvline(place, color="black", linewidth=0.8, linestyle=":")
    axes.text(place + 20, logits[loc].max() - 2, f"{edge}: {place}")
    axes.set(ylabel="logit", xlim=(0, 1023))
    axes.spines[["top", "right"]].set_visible(False)
plots[-1].set(xlabel="location token: 1024ths of the side of the picture")
figure.suptitle("Logits of the location tokens in the first four steps")
plt.show()

# %% [markdown]
# Each time there is one high peak, at an edge of the red circle. It is some bins wide, and the bins in it
# share the probability. This is why a single location token has a probability of less than 10 % when the
# model is sure of the edge.

# %%
for edge, logits, place in zip(edges, steps[:4], chosen, strict=True):
    chances = layers.softmax(logits)[loc]
    near = chances[place - 20 : place + 21].sum()
    print(f"{edge:10}  probability of the token {chances[place]:.2f}, of the bins within 20 of it {near:.2f}")
    assert chances[place] < 0.1
    assert near > 0.95

# %% [markdown]
# `processor.parse` reads the answer: it finds groups of four location tokens, scales them to pixels, and
# takes the text after them as the label.

# %%
found = processor.parse(new[0], image.size)
y0, x0, y1, x1 = chosen
width, height = image.size
by_hand = (x0 / 1024 * width, y0 / 1024 * height, x1 / 1024 * width, y1 / 1024 * height)
assert found.objects[0].box == tuple(map(round, by_hand))
print(found.objects[0].label, "in the box", found.objects[0].box, "of pixels: x0, y0, x1, y1")

figure, axes = plt.subplots(figsize=(3.4, 3.4))
axes.imshow(draw(image, found.objects))
axes.set(title="the answer, drawn", xlabel="x, pixels", ylabel="y, pixels")
plt.show()

# %% [markdown]
# ## Mask tokens
#
# For the prompt `segment ...` the published models add 16 tokens to the box, out of 128 from `<seg000>` to
# `<seg127>`. They are the codes of a small picture of the mask, made by a vector-quantised autoencoder: a
# grid of 4 x 4 places, with one of 128 learned vectors in each. A decoder
# ([`reference/mask_decoder.py`](../reference/mask_decoder.py)) turns them into a mask, which is stretched
# over the box. The demo was not taught masks, so the codes in this cell are made up. They show how an answer
# with a mask is read.

# %%
codes = range(0, 128, 8)
segmented = answer.replace(" red circle", "".join(f"<seg{code:03}>" for code in codes) + " red circle")
with_mask = processor.parse(processor.tokenizer.encode(segmented), image.size).objects[0]
assert (with_mask.label, with_mask.box, len(with_mask.codes)) == ("red circle", found.objects[0].box, 16)
assert len(processor.tokenizer.encode("<seg127>")) == 1 < len(processor.tokenizer.encode("<seg128>"))
print(np.reshape(with_mask.codes, (4, 4)))

# %% [markdown]
# ## What a word looks at
#
# The weights of the decoder's attention tell from where a token takes its information. The word that comes
# next is chosen at the token before it, so that is the one whose attention we draw: in the last layer, as a
# mean of its heads. First for a caption, at the words for the colours; `suffix` gives the model the whole
# answer, so that one pass computes all of its tokens.


# %%
def decoder_weights(record, layer, kinds):  # -> (H, T, T): heads, tokens that look, tokens that are looked at
    name = f"language_model.model.layers.{layer}.self_attn"
    q, k = record[f"{name}.q_rope"][0], record[f"{name}.k_rope"][0, :, 0]
    scores = np.einsum("thd,sd->hts", q, k) / math.sqrt(text.head_dim)
    weights = layers.softmax(np.where(make_attn_mask(np.ones_like(kinds, bool), kinds)[0], scores, -np.inf))
    values = np.einsum("hts,sd->thd", weights, record[f"{name}.v_proj"][0]).reshape(len(q), -1)
    assert np.allclose(values, record[f"{name}.o_proj.input"][0])  # what the reference computed
    return weights


def show_attention(prompt, answer, words):  # -> the patch, as (row, column), that each word looks at most
    inputs, record = processor.arrays(prompt, image, suffix=answer), {}
    logits = model.forward(**inputs, record=record)[0]
    ids, kinds = inputs["input_ids"][0], inputs["token_type_ids"]
    begin = len(ids) - kinds.sum()  # of the answer
    assert np.array_equal(logits[begin - 1 : -1].argmax(axis=-1), ids[begin:])  # it is the model's own answer
    weights = decoder_weights(record, text.num_hidden_layers - 1, kinds).mean(axis=0)
    texts = processor.tokenizer.texts(ids.tolist())
    looking = [texts.index(word, begin) - 1 for word in words]
    figure, plots = plt.subplots(1, len(words), figsize=(8, 2.5))
    for axes, word, token in zip(plots, words, looking, strict=True):
        spotlight(axes, weights[token, :64], word.strip())
    figure.suptitle(f"Attention over the picture when a token is chosen, % (prompt: {prompt})")
    plt.show()
    return [divmod(int(weights[token, :64].argmax()), side) for token in looking]


caption = processor.tokenizer.decode(model.generate(**processor.arrays("caption en", image)))
print(caption)
most = show_attention("caption en", caption, [" blue", " red", " green", " orange"])
print("looked at most, as (row, column):", most)
row, column = most[1]  # of the word "red": a patch that overlaps the box of the red circle
assert y0 < (row + 1) * 1024 / side
assert row * 1024 / side < y1
assert x0 < (column + 1) * 1024 / side
assert column * 1024 / side < x1

# %% [markdown]
# Before it writes a colour, the model looks at the shape that it is about to name. Now the same for the box.

# %%
edge_tokens = processor.tokenizer.texts(new[0, :4].tolist())
top, left, bottom, right = show_attention("detect red circle", answer, edge_tokens)
assert top[0] < bottom[0]  # rows
assert left[1] < right[1]  # columns

# %% [markdown]
# For the upper edge it looks at the top of the circle, for the left edge at its left, and so on: each
# location token reads the patches at its own edge.
#
# ## The KV cache
#
# So far each step computed all tokens again. That is not necessary: a token of the prefix does not see the
# answer, and a token of the answer does not see what comes after it. So the keys and values of all earlier
# tokens stay what they were. An engine stores them, in the KV cache, and computes only the new token in each
# step. The cell compares the prefix in the first step with the prefix in the pass over the whole answer. Keys
# and values are the same. They would not be, if the prefix could see the answer.

# %%
whole, unmasked = {}, {}
model.forward(**with_answer, record=whole)
model.forward(with_answer["input_ids"], pixels, record=unmasked)  # all tokens count as prefix
cached = [name for name in record if name.startswith("language") and name.endswith(("k_rope", "v_proj"))]
assert all(np.allclose(whole[name][:, :T], record[name]) for name in cached)
assert not np.allclose(unmasked[cached[-1]][:, :T], record[cached[-1]])

kept = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
assert kept * T == sum(record[name].size for name in cached)
print(f"{kept} numbers for a token: keys and values of {text.num_hidden_layers} layers")
print(f"{kept * T} for the prefix; {text.num_attention_heads} times as many, had each head its own keys")

# %% [markdown]
# The PyTorch model of this package has such a cache. Its first pass (prefill) computes the prefix and fills
# the cache. Each later one (decode) computes one token. The answer is the same.

# %%
fast, fast_processor = load_hf_model("demo", device="cpu", dtype="float32")
fast_ids = fast.generate(**fast_processor("detect red circle", image))
assert np.array_equal(fast_ids, new)
print(fast_processor.tokenizer.decode(fast_ids[0]))

# %% [markdown]
# ## Where bfloat16 starts to differ
#
# Models usually run in bfloat16, which takes half the memory of float32. It has 8 significant bits, so a
# rounding changes a number by at most 1 part in 256. The reference can compute the same formulas with each
# result rounded to a dtype. We compare each of its results, in the order of the data flow, with float64. The
# error is relative: the root mean square of the differences, divided by that of the result.

# %%
rounded = {"float32": {}, "bfloat16": {}}
for dtype, results in rounded.items():
    reference.load(demo.CHECKPOINT, dtype=dtype).forward(**inputs, record=results)
order = list(record)
errors = {
    dtype: [compare(name, results[name], record[name], results[name], dtype).rms for name in order]
    for dtype, results in rounded.items()
}
for dtype, values in errors.items():
    print(f"the first result that differs in {dtype}: {order[np.flatnonzero(values)[0]]}")
changed = rounded["bfloat16"]["pixel_values"] - pixels
assert np.mean(changed != 0) > 0.5
assert (np.abs(changed) <= np.abs(pixels) / 256).all()
assert errors["bfloat16"][1] < max(errors["bfloat16"]) < 0.01
assert max(errors["float32"]) < 1e-5

# %% [markdown]
# The PyTorch model in bfloat16 is judged by the same errors: its own may be at most twice those of the
# formulas, at each result. `python -m paligemma.compare` prints this as a table.

# %%
fast, _ = load_hf_model("demo", device="cpu", dtype="bfloat16")
own = {}
with recording(fast, own):
    fast(**fast_processor("detect red circle", image))

bfloat16, judged = rounded["bfloat16"], [name for name in order if name in own]
lines = [compare(name, own[name], record[name], bfloat16[name], "bfloat16") for name in judged]
print(f"results of the PyTorch model that exceed the rule: {sum(line.exceeds for line in lines)}")

figure, axes = plt.subplots(figsize=(8, 3.6))
at = [order.index(name) for name in judged]
axes.semilogy(at, [line.rms_allowed for line in lines], ":", color="black", label="allowed")
axes.semilogy(errors["bfloat16"], color=BLUE, label="formulas, bfloat16")
axes.semilogy(at, [line.rms for line in lines], ".", color=ORANGE, label="PyTorch, bfloat16")
axes.semilogy(errors["float32"], "--", color=GREEN, label="formulas, float32")
for name, part in (("vision_tower", "vision tower"), ("multi_modal", "projector, decoder")):
    begin = next(n for n, one in enumerate(order) if one.startswith(name))
    axes.axvline(begin - 0.5, color="black", linewidth=0.5)
    axes.text(begin, 4e-2, part)
axes.set(title="Error against float64", ylabel="relative RMS error", ylim=(1e-7, 1e-1))
axes.set(xlabel="number of the result, in the order of the data flow")
axes.legend(ncols=2, loc=(0.55, 0.4))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# In bfloat16 the picture itself is the first result that differs: most of the values of its pixels are not
# bfloat16 numbers. In float32 it is the first product. After that the error grows slowly, and stays below 1 %
# in bfloat16, although each result is rounded: the roundings are nearly independent, and partly cancel. The
# dip is the embedding of the text, which no result comes before.
#
# A small error can still change an answer, where two tokens are nearly equal. In the first step the best two
# logits are closer to each other than neighbouring bfloat16 numbers of that size. So bfloat16 may choose
# another bin of the same peak. The logit of what it chooses is below the best by at most the sum of the
# errors of the two.

# %%
exact, near = record["logits"][0, -1], bfloat16["logits"][0, -1]
second, best = np.sort(exact)[-2:]
spacing = 2.0 ** (math.floor(math.log2(best)) - 7)
print(f"the best two logits: {best:.4f} and {second:.4f}; bfloat16 numbers of this size are {spacing} apart")
assert best - second < spacing
assert best - exact[near.argmax()] <= 2 * np.abs(near - exact).max()

# %% [markdown]
# ## Read on
#
# - [`reference/siglip.py`](../reference/siglip.py), [`gemma.py`](../reference/gemma.py) and
#   [`model.py`](../reference/model.py): all that this tour called.
# - [`paligemma/siglip.py`](../paligemma/siglip.py) and [`gemma.py`](../paligemma/gemma.py): the same
#   functions in PyTorch, to be read beside them.
# - [accuracy.md](accuracy.md): the rule of accuracy, and how to find the layer where numbers differ.
# - [architecture.md](architecture.md): the path of a token and of a weight through the files.
# - [checkpoints.md](checkpoints.md): which checkpoints load, and how the demo model is trained.
