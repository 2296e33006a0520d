// The fold in one neuron: the same output from fewer and fewer numbers.

const at = (id) => document.getElementById(id);
const dot = (one, other) => one.reduce((sum, number, place) => sum + number * other[place], 0);

/** One row for each step: its name, what happens, the formula, the numbers that are left, and y of them. */
const STEPS = [
  {
    title: "As it was trained",
    text: "The Linear computes h. The BatchNorm shifts and scales it with four numbers that training has settled, and ε.",
    formula: "h = w·x + b,  y = γ (h − μ) / √(σ² + ε) + β",
    left: ["b", "μ", "σ²", "ε", "γ", "β"],
    y: (n) => (n.γ * (dot(n.w, n.x) + n.b - n.μ)) / Math.sqrt(n["σ²"] + n.ε) + n.β,
  },
  {
    title: "One scale",
    text: "γ, σ² and ε occur together only: they are one number, s. A standard deviation, not a variance; and ε belongs in it.",
    formula: "s = γ / √(σ² + ε),  y = s (w·x + b − μ) + β",
    left: ["s", "b", "μ", "β"],
    y: (n) => n.s * (dot(n.w, n.x) + n.b - n.μ) + n.β,
  },
  {
    title: "Into the weights",
    text: "Multiplied out, every weight of the neuron is scaled by s.",
    formula: "w₂ = s w,  y = w₂·x + s (b − μ) + β",
    left: ["s", "b", "μ", "β"],
    y: (n) => dot(n.w.map((weight) => n.s * weight), n.x) + n.s * (n.b - n.μ) + n.β,
  },
  {
    title: "Into the bias",
    text: "What does not depend on x is one number. The old bias is shifted and scaled, too.",
    formula: "b₂ = s (b − μ) + β,  y = w₂·x + b₂",
    left: ["b₂"],
    y: (n) => dot(n.w.map((weight) => n.s * weight), n.x) + (n.s * (n.b - n.μ) + n.β),
  },
  {
    title: "In the file",
    text: "The file holds w₂ and b₂, rounded to float32. The BatchNorm is gone, and nothing is left to compute for it.",
    formula: "y = w₂·x + b₂",
    left: ["b₂ of the file"],
    y: (n) => dot(n.w2, n.x) + n["b₂ of the file"],
  },
];
const SCALED = 2, STORED = 4;

/** All numbers of one neuron; x is what it gets. */
function gather(layer, neuron, x) {
  const n = {
    x, w: layer.W[neuron], b: layer.b[neuron], γ: layer.gamma[neuron], β: layer.beta[neuron],
    μ: layer.mean[neuron], "σ²": layer.var[neuron], ε: layer.eps[0],
    w2: layer.W2[neuron], "b₂ of the file": layer.b2[neuron],
  };
  n.s = n.γ / Math.sqrt(n["σ²"] + n.ε);
  n["b₂"] = n.s * (n.b - n.μ) + n.β;
  return n;
}

const minus = (text) => text.replace("-", "−");
const spell = (number) => minus(
  !number ? "0" : Math.abs(number) < 1e-4 ? number.toExponential(1) : number.toFixed(6));

function showNumbers(step, n) {
  const known = STEPS[step - 1]?.left ?? STEPS[step].left;
  at("numbers").replaceChildren(...STEPS[step].left.map((symbol) => {
    const box = document.createElement("div"), [name, value] = ["dt", "dd"].map((tag) => document.createElement(tag));
    box.classList.toggle("new", !known.includes(symbol));
    name.textContent = symbol;
    value.textContent = spell(n[symbol]);
    box.append(name, value);
    return box;
  }));
}

function draw(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** The weights as bars about zero, those of the training as outlines. */
function showWeights(step, n) {
  const weights = step < SCALED ? n.w : step < STORED ? n.w.map((weight) => n.s * weight) : n.w2;
  const most = Math.max(...[...n.w, ...weights].map(Math.abs)) || 1, high = (weight) => (48 * Math.abs(weight)) / most;
  const bar = (weight, place, kind, wide) => draw("rect", {
    class: kind, x: place + (1 - wide) / 2, width: wide, y: weight < 0 ? 50 : 50 - high(weight), height: high(weight),
  });
  const svg = at("weights"), count = weights.length;
  svg.setAttribute("viewBox", `0 0 ${count} 100`);
  svg.replaceChildren(
    ...weights.map((weight, place) => bar(weight, place, "now", 0.8)),
    ...(step < SCALED ? [] : n.w.map((weight, place) => bar(weight, place, "was", 0.8))),
    draw("line", { x1: 0, x2: count, y1: 50, y2: 50 }),
  );
  const range = `from ${spell(Math.min(...weights))} to ${spell(Math.max(...weights))}`;
  const said = step < SCALED ? `The ${count} weights w, ${range}.`
    : `The ${count} weights w₂, ${range}: each s = ${spell(n.s)} times the trained one (outlined).`;
  at("weighed").textContent = said;
  svg.setAttribute("aria-label", said);
}

function showStep(step, n) {
  const { title, text, formula, y } = STEPS[step], before = STEPS[0].y(n), after = y(n);
  at("title").textContent = `Step ${step} of ${STEPS.length - 1}: ${title}`;
  at("explained").textContent = text;
  at("formula").replaceChildren(...formula.split(",  ").flatMap((part, place) => {
    const line = document.createElement("span");
    line.textContent = part;
    return place ? [document.createElement("br"), line] : [line];
  }));
  at("step").setAttribute("aria-valuetext", title);
  at("back").disabled = step === 0;
  at("on").disabled = step === STEPS.length - 1;
  at("before").textContent = spell(before);
  at("after").textContent = spell(after);
  at("apart").textContent = spell(Math.abs(after - before));
}

/** Fill the controls; return what shows the fold for a context, given the logits of the folded net. */
export function showFold(layers, runUnfolded) {
  let values;
  at("layer").append(...layers.map((layer, place) => new Option(`${layer.linear} + ${layer.batchnorm}`, place)));
  const update = () => {
    const layer = layers[at("layer").value], neuron = at("neuron"), step = Number(at("step").value);
    neuron.max = layer.W.length - 1;
    if (neuron.value === "" || !neuron.validity.valid) return;
    const n = gather(layer, Number(neuron.value), Array.from(values[layer.x].data));
    showStep(step, n);
    showNumbers(step, n);
    showWeights(step, n);
  };
  const go = (by) => {
    at("step").value = Number(at("step").value) + by;
    update();
  };
  at("layer").addEventListener("input", () => {
    at("neuron").value = Math.min(at("neuron").value, layers[at("layer").value].W.length - 1);
    update();
  });
  for (const id of ["neuron", "step"]) at(id).addEventListener("input", update);
  at("back").addEventListener("click", () => go(-1));
  at("on").addEventListener("click", () => go(1));
  return async (context, logits) => {
    values = await runUnfolded([context]);
    const apart = logits.map((logit, place) => Math.abs(logit - values.logits.data[place]));
    at("nets").textContent = `Both whole nets in onnxruntime, for what is typed above: their ${logits.length} outputs differ `
      + `by at most ${minus(Math.max(...apart).toExponential(1))}, the rounding of float32.`;
    update();
  };
}
