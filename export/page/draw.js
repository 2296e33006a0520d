// Names for a seed: in a browser what export/sample.py draws, with the same uniform numbers.
//
// They are the doubles of NumPy's default_rng((seed, attempt)): its SeedSequence mixes the two numbers into 256 bits
// (O'Neill, "Developing a seed_seq alternative", 2015), from which a PCG64 with output XSL RR starts (O'Neill 2014).

const LOW = (1n << 64n) - 1n, ALL = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;
const POOL = 4, ATTEMPTS = 100;

/** A whole number as 32-bit words, the lowest first; zero has one. */
function split(number) {
  const words = [];
  do {
    words.push(Number(number & 0xffffffffn));
    number >>= 32n;
  } while (number);
  return words;
}

/** Return a function that hashes 32-bit words, each with another constant. */
function hasher(constant, multiplier) {
  return (word) => {
    word ^= constant;
    constant = Math.imul(constant, multiplier);
    word = Math.imul(word, constant);
    return (word ^ (word >>> 16)) >>> 0;
  };
}

function mix(one, other) {
  const word = Math.imul(0xca01f9dd, one) - Math.imul(0x4973f715, other);
  return (word ^ (word >>> 16)) >>> 0;
}

/** NumPy's SeedSequence(numbers).generate_state(4, uint64). */
export function seedState(numbers) {
  const entropy = numbers.flatMap(split), hash = hasher(0x43b0d7e5, 0x931e8875);
  const pool = Array.from({ length: POOL }, (_, place) => hash(entropy[place] ?? 0));
  const stir = (word, skip) => {
    for (let place = 0; place < POOL; place++) if (place !== skip) pool[place] = mix(pool[place], hash(word()));
  };
  for (let place = 0; place < POOL; place++) stir(() => pool[place], place);
  for (const word of entropy.slice(POOL)) stir(() => word);
  const draw = hasher(0x8b51f9dd, 0x58f38ded);
  const words = Array.from({ length: 2 * POOL }, (_, place) => BigInt(draw(pool[place % POOL])));
  return Array.from({ length: POOL }, (_, place) => words[2 * place] | (words[2 * place + 1] << 32n));
}

/** NumPy's default_rng(numbers).random(count): doubles from 0 to 1, 1 excluded. */
export function uniform(numbers, count) {
  const [high, low, odd, even] = seedState(numbers);
  const increment = ((((odd << 64n) | even) << 1n) | 1n) & ALL;
  const step = (state) => (state * MULTIPLIER + increment) & ALL;
  let state = step((increment + ((high << 64n) | low)) & ALL);
  return Array.from({ length: count }, () => {
    state = step(state);
    const word = (state >> 64n) ^ (state & LOW), turn = state >> 122n;
    const turned = ((word >> turn) | (word << (64n - turn))) & LOW;
    return Number(turned >> 11n) / 2 ** 53;
  });
}

/** softmax(logits / temperature), not yet divided by its sum, and its running sums. */
function accumulate(logits, temperature) {
  const most = Math.max(...logits);
  let sum = 0;
  return Array.from(logits, (logit) => (sum += Math.exp((logit - most) / temperature)));
}

/** The probability of every character. */
export function odds(logits, temperature) {
  const sums = accumulate(logits, temperature);
  return sums.map((sum, place) => (sum - (sums[place - 1] ?? 0)) / sums.at(-1));
}

/** The character that a uniform number picks. */
export function choose(logits, chance, temperature) {
  const sums = accumulate(logits, temperature);
  return sums.filter((sum) => sum <= chance * sums.at(-1)).length;
}

/** The last characters of a name, filled up with terminators in front. */
export function contextOf(net, indices) {
  return [...Array(net.length).fill(0), ...indices].slice(-net.length);
}

/**
 * Yield `count` different names, or fewer if a hundred attempts for each do not give them.
 *
 * net: { length, batch, vocabulary, run(contexts) -> logits of each }; start: indices of characters; seed: a BigInt.
 */
export async function* invent(net, { count, seed, temperature, longest, start }) {
  const seen = new Set([""]), attempts = ATTEMPTS * count;
  for (let first = 0; first < attempts; first += net.batch) {
    const size = Math.min(net.batch, attempts - first);
    const names = await draw(net, first, size, { seed, temperature, longest, start });
    for (const name of names.filter((name) => name !== null && !seen.has(name))) {
      if (seen.has(name)) continue;
      seen.add(name);
      yield name;
      if (seen.size > count) return;
    }
  }
}

/** The names of some attempts; null for one that did not come to an end. */
async function draw(net, first, size, { seed, temperature, longest, start }) {
  const steps = longest + 1 - start.length, names = Array(size).fill(null);
  let open = Array.from({ length: size }, (_, row) => {
    return { row, indices: [...start], chances: uniform([seed, BigInt(first + row)], steps) };
  });
  for (let step = 0; step < steps && open.length; step++) {
    const logits = await net.run(open.map(({ indices }) => contextOf(net, indices)));
    open.forEach((one, place) => one.indices.push(choose(logits[place], one.chances[step], temperature)));
    for (const { row, indices } of open.filter(({ indices }) => indices.at(-1) === 0)) {
      names[row] = indices.slice(0, -1).map((index) => net.vocabulary[index]).join("");
    }
    open = open.filter(({ indices }) => indices.at(-1) !== 0);
  }
  return names;
}
