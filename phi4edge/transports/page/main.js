// The page: says what it does in words, measures, posts, and tells when it could not.

import { deviceFacts } from "/page/device.js";

const at = (id) => document.getElementById(id);
let ended = false, hidden = 0, latest = { text: "starting", done: 0, total: 0 };

async function post(kind, said) {
  const answer = await fetch(`/say/${kind}`, { method: "POST", body: JSON.stringify(said) });
  if (answer.status === 410) throw new Error("the computer has ended the measurement");
  if (!answer.ok) throw new Error(`the computer does not take this: ${await answer.text()}`);
}

async function postRow(chunk, position, row) {
  const answer = await fetch(`/row/${chunk}/${position}`, { method: "POST", body: row });
  if (!answer.ok) throw new Error(`the computer does not take this: ${await answer.text()}`);
}

let drawn = 0;
function show(text, detail, done, total) {
  latest = { text: `${text}, ${detail}`, done, total };
  const now = performance.now();
  if (now - drawn < 100 && at("state").textContent === text) return;
  drawn = now;
  at("state").textContent = text;
  at("detail").textContent = detail;
  if (total) at("bar").value = done / total;
  else at("bar").removeAttribute("value");
}

function list(id, rows) {
  at(id).replaceChildren(...rows.flatMap(([name, value]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    return [dt, dd];
  }));
  at(id).hidden = false;
}

function note(text, loud = false) {
  const item = document.createElement("li");
  item.classList.toggle("loud", loud);
  item.textContent = text;
  at("notes").append(item);
}

async function fail(message) {
  if (ended) return;
  ended = true;
  at("title").textContent = "It did not work";
  at("state").textContent = "Stopped";
  at("detail").textContent = "The computer was told why.";
  at("bar").hidden = true;
  at("problem").textContent = message;
  at("problem").hidden = false;
  try {
    await post("error", { message });
  } catch {
    at("detail").textContent = "The computer could not be told.";
  }
}

let lock = null;
async function stayAwake() {
  try {
    lock = await navigator.wakeLock.request("screen"); // there is none where the page is not secure
    return true;
  } catch {
    return false;
  }
}

const NAMES = {
  user_agent: "Browser", platform: "System", platform_version: "Version", model: "Model", architecture: "Processor",
  hardware_concurrency: "Cores", device_memory_gib: "Memory, GiB", cross_origin_isolated: "Isolated",
  secure_context: "Secure", wasm_simd: "SIMD", wasm_threads: "Threads", clock_step_s: "Clock, s", screen: "Screen",
};
const inWords = (value) => ({ true: "yes", false: "no", null: "not told" }[value]
  ?? (typeof value === "number" && value < 1 ? value.toPrecision(2) : value));
const amount = (bytes) => (bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(2)} GB`);
const middle = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

async function main() {
  const facts = await deviceFacts();
  list("device", Object.entries(NAMES).map(([key, name]) => [name, inWords(facts[key])]));
  await post("hello", facts);
  if (!facts.wasm_simd) {
    return fail("This browser has no WebAssembly SIMD, without which a language model cannot be run in it. "
      + "Safari 16.4, Chrome 91, Firefox 89 and everything newer have it.");
  }
  const job = await (await fetch("/job")).json();
  at("model").textContent = job.name;
  if (!(await stayAwake())) note("Please keep the screen on, and this page in front.");
  const { loadModel } = await import("/page/model.js");
  const { measureDrift, measureSpeed } = await import("/page/measure.js");
  const { wllama, told } = await loadModel(job, (done, total) => {
    if (done < total) show("Fetching the model", `${amount(done)} of ${amount(total)}`, done, total);
    else show("Loading the model", "", 0, 0);
  });
  await post("loaded", told);
  if (told.threads === 1) {
    if (facts.cross_origin_isolated || told.info.threads_asked === 1) note("One thread computes.");
    else note("One thread computes, because this page came over plain http. This device can do more: end the "
      + "measurement, and start it with --tls.", true);
  }
  const rows = [["Model", amount(told.transferred)], ["Threads", told.threads], ["Load", `${told.load_s.toFixed(2)} s`]];
  const times = { prefill: [], decode: [] };
  if (job.speed) {
    await measureSpeed(wllama, job.speed, show, async (kind, said) => {
      times[kind].push(kind === "prefill" ? job.speed.prompt.length / said.prefill_s : 1 / middle(said.token_s));
      await post(kind, said);
    });
    if (times.prefill.length) rows.push(["Prompt", `${middle(times.prefill).toFixed(2)} tok/s`]);
    if (times.decode.length) rows.push(["Generation", `${middle(times.decode).toFixed(2)} tok/s`]);
  }
  if (job.drift) {
    await measureDrift(wllama, job.drift, show, postRow);
    rows.push(["Text", `${job.drift.chunks.length * (job.drift.chunks[0].length - job.drift.first)} positions`]);
  }
  await post("done", { hidden });
  ended = true;
  lock?.release();
  at("title").textContent = "Done";
  at("state").textContent = "Everything was measured";
  at("detail").textContent = "The results are on the computer. You may close this page.";
  at("bar").value = 1;
  for (const item of document.querySelectorAll("#notes li:not(.loud)")) item.remove();
  list("results", rows);
}

setInterval(() => { if (!ended) post("status", latest).catch(() => {}); }, 3000);
document.addEventListener("visibilitychange", () => {
  if (ended) return;
  if (document.hidden) hidden++;
  else stayAwake();
});
addEventListener("pagehide", () => { if (!ended) navigator.sendBeacon("/say/gone"); });
addEventListener("error", (event) => fail(event.message || "something in the page failed"));
addEventListener("unhandledrejection", (event) => fail(String(event.reason?.message ?? event.reason)));
main().catch((error) => fail(error.message));
