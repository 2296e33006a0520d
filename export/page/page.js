// The page: what is typed goes to the net, and what the net says goes to the bars, the names and the fold.

import * as ort from "./ort.wasm.bundle.min.mjs";
import { contextOf, invent, odds } from "./draw.js";
import { showFold } from "./fold.js";

const COUNT = 20, LONGEST = 30;
const at = (id) => document.getElementById(id);
const read = async (name) => (await fetch(name)).json();

/** One call after the other, since a session takes no second one while it runs; keys and frames come in between. */
let turn = Promise.resolve(), rested = 0;
function inTurn(work) {
  const done = turn.then(rest).then(work);
  turn = done.catch(() => {});
  return done;
}

async function rest() {
  if (performance.now() - rested < 12) return;
  await new Promise((done) => setTimeout(done));
  rested = performance.now();
}

async function open(file) {
  const session = await ort.InferenceSession.create(file);
  return async (contexts) => {
    const cells = BigInt64Array.from(contexts.flat(), BigInt);
    const tensor = new ort.Tensor("int64", cells, [contexts.length, contexts[0].length]);
    return inTurn(() => session.run({ [session.inputNames[0]]: tensor }));
  };
}

/** The net as `draw.js` wants it; a batch that is not full is filled with zeros. */
async function openNet(told) {
  const call = await open("net.onnx"), width = told.vocabulary.length;
  const run = async (contexts) => {
    const rest = Array(told.batch - contexts.length).fill(Array(told.length).fill(0));
    const [logits] = Object.values(await call([...contexts, ...rest]));
    return contexts.map((_, row) => logits.data.subarray(row * width, (row + 1) * width));
  };
  return { ...told, run };
}

/** The same net for as long as it is asked in earnest; then its next call fails, which ends whatever waits for it. */
function whileCurrent(net, isCurrent) {
  const run = async (contexts) => {
    if (!isCurrent()) throw new Error("superseded");
    return net.run(contexts);
  };
  return { ...net, run };
}

/** The indices of what was typed, or an error that says what is wrong with it. */
function spell(net, text) {
  return Array.from(text, (one) => {
    const index = net.vocabulary.indexOf(one, 1);
    if (index < 0) throw new Error(`The net does not know “${one}”.`);
    return index;
  });
}

function makeBars(net, append) {
  const box = at("odds");
  for (const columns of [2, 3]) box.style.setProperty(`--rows-${columns}`, Math.ceil(net.vocabulary.length / columns));
  return net.vocabulary.map((one, index) => {
    const button = document.createElement("button");
    button.type = "button";
    const [name, bar, percent] = ["b", "i", "span"].map((tag) => document.createElement(tag));
    name.textContent = index ? one : "end";
    button.append(name, bar, percent);
    button.disabled = !index;
    button.addEventListener("click", () => append(one));
    box.append(button);
    return { button, bar, percent, name: name.textContent };
  });
}

function showOdds(bars, shares) {
  const most = Math.max(...shares);
  bars.forEach(({ button, bar, percent, name }, index) => {
    bar.style.setProperty("--share", shares[index] / most);
    percent.textContent = `${(100 * shares[index]).toFixed(1)} %`;
    button.classList.toggle("likeliest", shares[index] === most);
    button.setAttribute("aria-label", `${name}: ${percent.textContent}`);
  });
}

function quote(text) {
  return /^[\w.]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;
}

/** The command in pieces, between which a narrow page breaks it. */
function showCommand(net, { seed, temperature, text }) {
  const parts = ["python -m export.sample", quote(net.file), `--count ${COUNT}`, `--seed ${seed}`];
  if (temperature !== 1) parts.push(`--temperature ${temperature}`);
  if (text) parts.push(`--start ${quote(text)}`);
  at("command").replaceChildren(...parts.flatMap((part) => {
    const piece = document.createElement("span");
    piece.textContent = part;
    return [piece, " "];
  }));
}

async function showNames(net, wish) {
  const list = at("names"), items = [];
  list.setAttribute("aria-busy", "true");
  showCommand(net, wish);
  for await (const name of invent(net, { count: COUNT, longest: LONGEST, ...wish })) {
    const item = document.createElement("li"), begun = document.createElement("mark");
    begun.textContent = wish.text;
    item.append(begun, name.slice(wish.text.length));
    items.push(item);
  }
  list.replaceChildren(...items);
  list.setAttribute("aria-busy", "false");
  at("said").textContent = items.length < COUNT ? `There are no more than ${items.length} in so many attempts.` : "";
}

function readWish(net) {
  const text = at("start").value, seed = at("seed").value.trim();
  if (!/^\d{1,40}$/.test(seed)) throw new Error("A seed is a number from 0 up.");
  return { text, start: spell(net, text), seed: BigInt(seed), temperature: Number(at("temperature").value) };
}

function connect(net, fold) {
  let newest = 0;
  const bars = makeBars(net, (one) => {
    const start = at("start");
    if (start.value.length < LONGEST) start.value += one;
    update();
  });
  const update = async () => {
    const number = ++newest, isCurrent = () => number === newest;
    at("wrong").textContent = "";
    at("heat").textContent = at("temperature").value;
    try {
      const wish = readWish(net), context = contextOf(net, wish.start);
      at("context").textContent = context.map((index) => net.vocabulary[index]).join("");
      const asked = whileCurrent(net, isCurrent), [logits] = await asked.run([context]);
      showOdds(bars, odds(logits, wish.temperature));
      await fold?.(context, logits);
      await showNames(asked, wish);
    } catch (error) {
      if (isCurrent()) at("wrong").textContent = error.message;
    }
  };
  for (const id of ["start", "seed", "temperature"]) at(id).addEventListener("input", update);
  at("other").addEventListener("click", () => {
    at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
    update();
  });
  return update();
}

async function start() {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", import.meta.url).href };
  const told = await read("net.json"), net = await openNet(told);
  at("length").textContent = told.length;
  at("file").textContent = at("file").download = told.file;
  const fold = told.fold === null ? showFold(await read("fold.json"), await open("unfolded.onnx")) : null;
  at("fold").hidden = !fold;
  at("unfolded").hidden = !!fold;
  at("unfolded").textContent = `The fold is not shown: ${told.fold}.`;
  at("page").hidden = false;
  at("status").hidden = true;
  await connect(net, fold);
}

start().catch((error) => {
  at("status").textContent = `The page cannot run here: ${error.message}`;
  throw error;
});
