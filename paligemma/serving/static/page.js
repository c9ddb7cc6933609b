// The page: a picture and a prompt in, an answer with boxes and masks out. Texts of the model and of the user
// enter the page as textContent only, so that none of them can become markup.

import { ApiError, ask, modelName } from "./api.js";
import { colours, drawMarks, score } from "./marks.js";

const SEVERAL = "Separate several names with a semicolon: cat ; dog";
const TASKS = [
  { name: "Caption", prefix: "caption en" },
  { name: "Answer", prefix: "answer en", label: "Question", hint: "For example: how many stars?" },
  { name: "Read text", prefix: "ocr" },
  { name: "Detect", prefix: "detect", label: "What to find", hint: SEVERAL },
  { name: "Segment", prefix: "segment", label: "What to find", hint: SEVERAL },
  { name: "Free prompt", prefix: "", label: "Prompt", hint: "It is sent as it is written." },
];
const SAMPLES = [ // files of paligemma/demo/samples, with prompts that its answers.json has
  ["shapes.png", "detect green circle ; orange square"],
  ["noisy.png", "detect shape"],
  ["outlined.png", "answer en how many blue shapes?"],
  ["stars.png", "detect star"],
];

const at = (id) => document.getElementById(id);
// latest: the file that was given last, which may not be shown yet. running: the AbortController of the
// question. json: the URL of the answer.
const state = { model: null, picture: null, latest: null, running: null, json: null };

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// The task and the prompt

function task() {
  return TASKS[at("form").elements.task.value];
}

function prompt() {
  const { prefix, label } = task();
  if (!prefix) return at("words").value;
  return label ? `${prefix} ${at("words").value.trim()}` : prefix;
}

function showTask() {
  const { label, hint, prefix } = task();
  at("words-row").hidden = !label;
  at("words-label").textContent = label ?? "";
  at("words-hint").textContent = hint ?? "";
  at("prompt").textContent = prefix && (!label || at("words").value.trim()) ? `Prompt: ${prompt()}` : "";
}

function setPrompt(text) {
  const n = TASKS.findIndex(({ prefix }) => text.startsWith(prefix)); // the last prefix is empty
  at("form").elements.task.value = n;
  at("words").value = text.slice(TASKS[n].prefix.length).trim();
  showTask();
}

// The picture

async function setPicture(blob, name) {
  stop();
  fail("");
  state.latest = blob;
  const shown = new Image();
  shown.src = URL.createObjectURL(blob);
  try {
    await shown.decode();
  } catch {
    URL.revokeObjectURL(shown.src);
    const problem = "it is damaged, or not a picture that this browser knows";
    throw new ApiError(`${name} cannot be shown: ${problem}. Try a PNG or a JPEG.`);
  }
  const url = await dataURL((await isReadAlike(blob)) ? blob : await repainted(shown));
  if (state.latest !== blob) throw new DOMException("another picture was chosen meanwhile", "AbortError");
  clearAnswer();
  URL.revokeObjectURL(at("picture").src);
  at("picture").src = shown.src;
  at("picture").alt = `The picture: ${name}`;
  at("picture").hidden = false;
  at("invitation").hidden = true;
  const size = [shown.naturalWidth, shown.naturalHeight];
  at("stage").style.setProperty("--ratio", size[0] / size[1]);
  at("about").textContent = `${name}, ${size[0]} × ${size[1]} pixels`;
  at("stage").scrollIntoView({ block: "nearest" });
  state.picture = { url, size };
}

/** Whether the server sees the picture as every browser shows it: a JPEG or a PNG, unless an orientation may be
 *  where some browsers do not look: in XMP, or anywhere in a PNG. Some ignore that of a WebP, and the server may
 *  not know other formats. The type of a file says only how its name ends, so the content counts. */
async function isReadAlike(blob) {
  const head = new TextDecoder("latin1").decode(await blob.slice(0, 300_000).arrayBuffer());
  return /^(ÿØÿ|‰PNG)/.test(head) && !/tiff:Orientation|Raw profile type|eXIf/.test(head);
}

/** The picture as a PNG without metadata, with the pixels that the browser shows. */
function repainted(shown) {
  const canvas = element("canvas", { width: shown.naturalWidth, height: shown.naturalHeight });
  canvas.getContext("2d").drawImage(shown, 0, 0);
  return new Promise((resolve, reject) => {
    const failed = new ApiError("This browser cannot convert the picture. Try a PNG or a JPEG.");
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(failed)));
  });
}

function dataURL(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new ApiError("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

function take(files) {
  const file = [...files].find(({ type }) => type.startsWith("image/")) ?? files[0];
  if (!file) return fail("That was not a file. Save the picture first, then drop it or choose it here.");
  setPicture(file, file.name).catch(report);
}

// The answer

async function answer() {
  if (state.running) return stop();
  fail("");
  if (!state.picture) return fail("There is no picture yet: choose one first.");
  if (task().label && !at("words").value.trim()) {
    at("words").focus();
    return fail(`Fill in “${task().label}” first.`);
  }
  clearAnswer();
  const { picture } = state;
  const running = (state.running = new AbortController());
  const asked = prompt();
  at("ask").textContent = "Stop";
  at("result").hidden = false;
  at("result").setAttribute("aria-busy", "true");
  at("status").textContent = "Looking at the picture …";
  const onText = (text) => {
    showText(text);
    at("status").textContent = "Answering …";
  };
  try {
    if (!state.model) await meet();
    const question = { model: state.model, picture: picture.url, prompt: asked, key: at("key").value };
    const got = await ask({ ...question, signal: running.signal, onText });
    showAnswer(got, asked, picture);
  } catch (error) {
    const stopped = running.signal.aborted;
    if (stopped && state.running) return; // by a question that runs now
    at("status").textContent = stopped ? "Stopped." : "";
    at("result").hidden = !at("text").textContent && !stopped;
    report(error);
  } finally {
    if (state.running === running) state.running = null;
    if (!state.running) {
      at("ask").textContent = "Ask";
      at("result").removeAttribute("aria-busy");
    }
  }
}

function stop() {
  state.running?.abort();
  state.running = null;
}

function clearAnswer() {
  if (state.json) URL.revokeObjectURL(state.json);
  state.json = null;
  at("json").hidden = true;
  at("text").textContent = at("status").textContent = "";
  at("objects").replaceChildren();
  at("marks").replaceChildren();
  at("result").hidden = true;
}

function showText(text) {
  at("text").textContent = text;
  at("text").classList.toggle("raw", /<loc\d{4}>/.test(text));
}

function showAnswer(got, asked, picture) {
  const { text, objects, image_size, timings, finish_reason } = got;
  const finding = /^(detect|segment)\b/.test(asked);
  showText(text || (finding ? "Nothing was found." : "The answer is empty."));
  const size = [image_size.width, image_size.height];
  if (size[0] === picture.size[0] && size[1] === picture.size[1]) {
    drawMarks(at("marks"), objects, size);
    if (objects.length) at("stage").scrollIntoView({ block: "nearest" });
  } else fail(`The server sees a picture of ${size.join(" × ")} pixels: the boxes are listed, but not drawn.`);
  const colour = colours(objects);
  at("objects").replaceChildren(...objects.map((o, n) => row(o, n, colour.get(o.label))));
  const count = objects.length ? `${objects.length} object${objects.length > 1 ? "s" : ""}. ` : "";
  const cut = finish_reason === "length" ? "The answer was cut off at its longest. " : "";
  const undecoded = text.includes("<seg") && !objects.some(({ mask }) => mask);
  const masks = undecoded ? "Its masks are not shown: the server was started without --masks. " : "";
  at("status").textContent = cut + count + masks + told(timings);
  const whole = { model: state.model, prompt: asked, ...got };
  state.json = URL.createObjectURL(new Blob([JSON.stringify(whole, null, 1)], { type: "application/json" }));
  at("json").href = state.json;
  at("json").hidden = false;
}

/** An object in the list. Its button shows it alone on the picture, and all of them when pressed again. */
function row({ label, box, score: value }, n, colour) {
  const swatch = element("span", { className: "swatch" });
  swatch.style.background = colour;
  const [x0, y0, x1, y1] = box;
  const where = `x ${x0} to ${x1}, y ${y0} to ${y1}`;
  const parts = [["name", label || "(no label)"], ["score", score(value)], ["quiet", where]];
  const spans = parts.map(([className, textContent]) => element("span", { className, textContent }));
  spans[1].title = "score, from 0 to 1";
  spans[2].title = "the edges of the box, in pixels of the picture";
  const button = element("button", { type: "button" }, swatch, ...spans);
  button.setAttribute("aria-pressed", "false");
  button.onclick = () => {
    const alone = button.getAttribute("aria-pressed") === "false";
    for (const other of at("objects").querySelectorAll("button")) {
      other.setAttribute("aria-pressed", other === button && alone);
    }
    for (const mark of at("marks").querySelectorAll("[data-object]")) {
      mark.classList.toggle("faint", alone && mark.dataset.object !== `${n}`);
    }
  };
  return element("li", {}, button);
}

/** The server's timings as a sentence. */
function told({ first_token_s, total_s, new_tokens, tokens_per_s }) {
  const rate = tokens_per_s ? `, ${tokens_per_s.toFixed(tokens_per_s < 10 ? 1 : 0)} tokens a second` : "";
  const tokens = `${new_tokens} token${new_tokens > 1 ? "s" : ""} after ${total_s.toFixed(2)} s`;
  const first = `First token after ${first_token_s.toFixed(2)} s`;
  return new_tokens > 1 ? `${first}, all ${tokens}${rate}.` : `${tokens}.`;
}

// Errors

function fail(sentence) {
  at("error").textContent = sentence;
}

function report(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ApiError)) console.error(error);
  const fault = "The page has a fault; the browser's console has the details.";
  fail(error instanceof ApiError ? error.message : fault);
  if (error.status === 401) {
    const first = "This server answers with its key only: enter it above.";
    fail(at("key").value ? "This is not the key of the server." : first);
    at("key-row").hidden = false;
    at("key").focus();
  }
}

// The start

async function meet() {
  state.model = await modelName(at("key").value);
  at("model").textContent = state.model;
  if (state.model !== "demo" || at("samples").children.length) return;
  for (const [name, text] of SAMPLES) {
    const picture = element("img", { src: `page/samples/${name}`, alt: "" });
    const button = element("button", { type: "button" }, picture, element("span", { textContent: text }));
    button.onclick = () => sample(name, text).catch(report);
    at("samples").append(element("li", {}, button));
  }
  at("demo").hidden = false;
}

async function sample(name, text) {
  stop();
  fail("");
  clearAnswer();
  const response = await fetch(`page/samples/${name}`).catch(() => null);
  if (!response?.ok) throw new ApiError("The server does not answer. Check that it still runs.");
  await setPicture(await response.blob(), name);
  setPrompt(text);
  await answer();
}

for (const [value, { name }] of TASKS.entries()) {
  const choice = element("input", { type: "radio", name: "task", value });
  at("tasks").append(element("label", {}, choice, element("span", { textContent: name })));
}
setPrompt("detect");
at("form").addEventListener("input", showTask);
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  answer();
});
at("key").addEventListener("change", () => meet().then(() => fail("")).catch(report));
at("file").addEventListener("change", () => {
  if (at("file").files.length) take(at("file").files);
  at("file").value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) take(clipboardData.files);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("stage").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("stage").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("stage").classList.remove("over");
  take(event.dataTransfer.files);
});
meet().catch(report);
