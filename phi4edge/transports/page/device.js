// What the browser tells of the device, and what WebAssembly can do in it.

// The smallest modules that need a feature: an i8x16 instruction; an atomic fence in shared memory.
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
const THREADS = [0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 5, 4, 1, 3, 1, 1, 10, 11, 1, 9, 0, 65, 0, 254, 16, 2, 0, 26, 11];

const validates = (bytes) => typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(bytes));

// Seconds between two values of the clock: browsers make it coarse, more so where the page is not isolated.
function clockStep() {
  let smallest = Infinity;
  for (let i = 0; i < 20; i++) {
    const before = performance.now();
    let now = before;
    for (let spins = 0; now === before && spins < 5_000_000; spins++) now = performance.now();
    if (now > before) smallest = Math.min(smallest, now - before);
  }
  return Number.isFinite(smallest) ? smallest / 1000 : null;
}

export async function deviceFacts() {
  const hints = navigator.userAgentData;
  let high = {};
  try {
    if (hints) high = await hints.getHighEntropyValues(["architecture", "bitness", "model", "platformVersion"]);
  } catch {
    high = {};
  }
  return {
    user_agent: navigator.userAgent,
    platform: high.platform ?? hints?.platform ?? navigator.platform ?? null,
    platform_version: high.platformVersion || null,
    model: high.model || null,
    architecture: high.architecture || null,
    hardware_concurrency: navigator.hardwareConcurrency ?? null,
    device_memory_gib: navigator.deviceMemory ?? null,
    cross_origin_isolated: globalThis.crossOriginIsolated === true,
    secure_context: globalThis.isSecureContext === true,
    wasm_simd: validates(SIMD),
    wasm_threads: typeof SharedArrayBuffer === "function" && validates(THREADS),
    clock_step_s: clockStep(),
    screen: `${screen.width}×${screen.height} at ${devicePixelRatio}`,
  };
}
