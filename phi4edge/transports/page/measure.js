// What is timed and read. A decode ends when its logits exist; only the steps between are ours.

const seconds = (began) => (performance.now() - began) / 1000;

async function timePrompt(wllama, tokens) {
  await wllama.kvClear();
  const began = performance.now();
  await wllama.decode(tokens, {});
  const prefill_s = seconds(began);
  await wllama.getLogits(1);
  return { prefill_s, ttft_s: seconds(began) };
}

async function timeTokens(wllama, tokens, onToken) {
  await wllama.kvClear();
  const token_s = [];
  for (const token of tokens) {
    const began = performance.now();
    await wllama.decode([token], {});
    token_s.push(seconds(began));
    onToken(token_s.length);
  }
  return { token_s };
}

// All of the prompt's repetitions, then all of the generation's, as the other runtimes here do it.
export async function measureSpeed(wllama, speed, show, post) {
  const { repetitions, warmup } = speed;
  const rounds = repetitions + warmup;
  const begin = (tokens) => (wllama.mustAddBosToken() ? [wllama.getBOS(), ...tokens.slice(1)] : tokens);
  if (speed.prompt.length) {
    const tokens = begin(speed.prompt);
    for (let i = 0; i < rounds; i++) {
      show(`Reading a prompt of ${tokens.length} tokens`, i < warmup ? "warm-up, not counted" : `round ${i - warmup + 1} of ${repetitions}`, i, rounds);
      const found = await timePrompt(wllama, tokens);
      if (i >= warmup) await post("prefill", found);
    }
  }
  if (speed.generated.length) {
    const tokens = begin(speed.generated);
    const total = rounds * tokens.length;
    for (let i = 0; i < rounds; i++) {
      const round = i < warmup ? "warm-up, not counted" : `round ${i - warmup + 1} of ${repetitions}`;
      const found = await timeTokens(wllama, tokens, (done) => {
        show(`Writing ${tokens.length} tokens`, round, i * tokens.length + done, total);
      });
      if (i >= warmup) await post("decode", found);
    }
  }
}

// The whole distribution behind every position from `first` on: the tokens before in one go, the others one by one.
export async function measureDrift(wllama, drift, show, postRow) {
  const { chunks, first } = drift;
  const steps = chunks.reduce((sum, tokens) => sum + tokens.length - first, 0);
  let done = 0, sending = Promise.resolve();
  for (const [number, tokens] of chunks.entries()) {
    const text = chunks.length > 1 ? `Reading text, part ${number + 1} of ${chunks.length}` : "Reading text";
    await wllama.kvClear();
    show(text, "the beginning", done, steps);
    if (first) await wllama.decode(tokens.slice(0, first), { skipLogits: true });
    for (let position = first; position < tokens.length; position++) {
      await wllama.decode([tokens[position]], {});
      const found = await wllama.getLogits(-1);
      const row = new Float32Array(found.length);
      for (const { token, p } of found) row[token] = p;
      await sending;
      sending = postRow(number, position, row);
      show(text, `${++done} of ${steps} tokens`, done, steps);
    }
  }
  await sending;
}
