// Pictures as plain arrays: resizing, connected components, and the files that are saved.
// A picture is {channels, height, width, data}: planes of a Float32Array one after the other. A mask
// is {height, width, data}: a Uint8Array of object ids, 0 for the background.

// As in network/views.py and network/outliers.py, which say what they are for
export const CLOSER = [2, 4];
const MARGIN = 2, REACH = 0.5, MIN_REACH = 8, REACH_ALONE = 1, VANISHED = 0.01, TINY = 1e-12;
const THRESHOLD = 0.5;  // of the foreground, as main.py's default

// Each output pixel along one side is a weighted sum of `count` inputs, from `first[i]` on.
// "linear" is OpenCV's INTER_LINEAR and "area" its INTER_AREA; "antialiased" is linear, and averages
// over as many inputs as an output pixel covers; "cubic" is Pillow's BICUBIC.
function taps(before, after, kind) {
  const step = before / after, reach = ['antialiased', 'cubic'].includes(kind) ? Math.max(1, step) : 1;
  const half = {area: (step + 1) / 2, cubic: 2 * reach}[kind] ?? reach, count = Math.min(before, Math.floor(2 * half) + 1);
  const first = new Int32Array(after), weights = new Float32Array(after * count);
  for (let i = 0; i < after; i++) {
    const centre = (i + 0.5) * step - 0.5, own = weights.subarray(i * count, (i + 1) * count);
    first[i] = Math.max(0, Math.min(before - count, Math.ceil(centre - half)));
    for (let k = 0, j = first[i]; k < count; k++, j++)
      own[k] = kind === 'area' ? Math.max(0, Math.min(j + 1, (i + 1) * step) - Math.max(j, i * step))
        : (kind === 'cubic' ? catmullRom : triangle)(Math.abs(j - centre) / reach);
    const sum = own.reduce((x, y) => x + y);
    for (let k = 0; k < count; k++) own[k] /= sum;
  }
  return {count, first, weights};
}

const triangle = x => Math.max(0, 1 - x);
const catmullRom = x => x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;

// Resizes a picture to [rows, columns].
export function resize(picture, [rows, columns], kind = 'linear') {
  const {channels, height, width, data} = picture;
  if (height === rows && width === columns) return picture;
  const tall = new Float32Array(channels * rows * width), out = new Float32Array(channels * rows * columns);
  const down = taps(height, rows, kind), across = taps(width, columns, kind);
  for (let line = 0; line < channels * rows; line++) {
    const row = line % rows, from = Math.floor(line / rows) * height + down.first[row], to = line * width;
    for (let k = 0; k < down.count; k++) {
      const weight = down.weights[row * down.count + k], start = (from + k) * width;
      if (weight) for (let x = 0; x < width; x++) tall[to + x] += weight * data[start + x];
    }
    for (let x = 0, w = 0; x < columns; x++) {
      const start = to + across.first[x];
      let sum = 0;
      for (let k = 0; k < across.count; k++) sum += across.weights[w++] * tall[start + k];
      out[line * columns + x] = sum;
    }
  }
  return {channels, height: rows, width: columns, data: out};
}

// Resizes a mask to [rows, columns] by nearest neighbour.
export function nearest({height, width, data}, [rows, columns]) {
  const [y, x] = [[height, rows], [width, columns]].map(([before, after]) => Array.from({length: after},
    (_, i) => Math.min(Math.floor(Math.fround((i + 0.5) * Math.fround(before / after))), before - 1)));
  const out = new Uint8Array(rows * columns);
  for (let r = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) out[r * columns + c] = data[y[r] * width + x[c]];
  return {height: rows, width: columns, data: out};
}

// The part of a picture or mask at `top`, `left`.
export function crop({channels = 1, height, width, data}, {top, left, rows, columns}) {
  const out = new data.constructor(channels * rows * columns);
  for (let line = 0; line < channels * rows; line++) {
    const from = (Math.floor(line / rows) * height + top + line % rows) * width + left;
    out.set(data.subarray(from, from + columns), line * columns);
  }
  return {channels, height: rows, width: columns, data: out};
}

// One plane for each of `ids`: 1 where the mask has it, else 0.
export function planes({height, width, data}, ids) {
  const out = new Float32Array(ids.length * data.length);
  ids.forEach((id, k) => data.forEach((value, i) => { if (value === id) out[k * data.length + i] = 1; }));
  return {channels: ids.length, height, width, data: out};
}

// A canvas' ImageData, or {data, height, width} of three or four bytes per pixel, as planes in [0, 255].
export function fromPixels({height, width, data}) {
  const size = height * width, step = data.length / size, out = new Float32Array(3 * size);
  for (let c = 0; c < 3; c++)
    for (let i = 0, j = c; i < size; i++, j += step) out[c * size + i] = data[j];
  return {channels: 3, height, width, data: out};
}

// Rounds like Python: halves to the even neighbour.
export function round(x) {
  const up = Math.round(x);
  return up - x === 0.5 && up % 2 ? up - 1 : up;
}

// 8-connected components of the pixels that are not 0: {count, parts}; part 0 is the rest.
export function components({height, width, data}) {
  const parts = new Int32Array(data.length), stack = [];
  let count = 1;
  for (let start = 0; start < data.length; start++) {
    if (!data[start] || parts[start]) continue;
    parts[start] = count;
    for (stack.push(start); stack.length;) {
      const i = stack.pop(), x = i % width, y = (i - x) / width;
      for (let v = Math.max(0, y - 1); v <= Math.min(height - 1, y + 1); v++)
        for (let u = Math.max(0, x - 1); u <= Math.min(width - 1, x + 1); u++) {
          const j = v * width + u;
          if (data[j] && !parts[j]) { parts[j] = count; stack.push(j); }
        }
    }
    count++;
  }
  return {count, parts};
}

// The pixels within `distance` pixels of those that are `id` in a mask, as a Uint8Array of 0 and 1.
// A pixel whose nearest one in its row is g away reaches sqrt(distance^2 - g^2) rows up and down.
export function extrude({height, width, data}, id, distance) {
  const starts = new Int32Array((height + 1) * width), out = new Uint8Array(data.length);
  const across = new Float32Array(width);
  for (let y = 0; y < height; y++) {
    for (let x = 0, g = Infinity; x < width; x++) across[x] = g = data[y * width + x] === id ? 0 : g + 1;
    for (let x = width - 1, g = Infinity; x >= 0; x--) {
      g = Math.min(across[x], g + 1);
      if (g > distance) continue;
      const reach = Math.floor(Math.sqrt(distance * distance - g * g));
      starts[Math.max(0, y - reach) * width + x]++;
      starts[Math.min(height, y + reach + 1) * width + x]--;
    }
  }
  for (let x = 0; x < width; x++)
    for (let y = 0, open = 0; y < height; y++) out[y * width + x] = (open += starts[y * width + x]) > 0;
  return out;
}

// Each location's set: 0 background, i for ids[i - 1], -1 for others. An object that contains no centre of a
// location gets the one that it covers most, or, if that is another object's only one, the nearest free one.
export function labelsOf(mask, grid, ids) {
  const {data} = nearest(mask, grid), [h, w] = grid;
  for (const id of [...new Set(mask.data)].sort((a, b) => a - b)) {
    if (!id || data.includes(id)) continue;
    const counts = new Uint32Array(256), pixels = [...mask.data.keys()].filter(i => mask.data[i] === id);
    const centre = (of, scale) => scale * (pixels.reduce((sum, i) => sum + of(i), 0) / pixels.length + 0.5);
    const y = centre(i => Math.floor(i / mask.width), h / mask.height), x = centre(i => i % mask.width, w / mask.width);
    for (const other of data) counts[other]++;
    const preferences = resize(planes(mask, [id]), grid, 'area').data.map((covered, i) =>
      data[i] && counts[data[i]] === 1 ? -Infinity
        : covered || -Math.hypot(Math.floor(i / w) + 0.5 - y, i % w + 0.5 - x));
    data[preferences.indexOf(Math.max(...preferences))] = id;
  }
  return BigInt64Array.from(data, id => BigInt(id && (ids.indexOf(id) + 1 || -1)));
}

// Zoomed crops of each object in a mask of the frame's size: where it is, its mask, and its labels, -1 for
// locations left out of the memory. All crops together add at most as many locations as one frame has.
export function* closer(mask, grid, ids) {
  const [h, w] = grid, most = Math.floor(h * w / (CLOSER.length * ids.length));
  for (const id of ids.filter(id => mask.data.includes(id)))
    for (const scale of CLOSER) {
      const at = around(mask, id, scale), part = crop(mask, at), own = labelsOf(part, grid, [id]), chosen = [];
      for (let i = 0; i < h * w; i++)
        if (own.some((set, j) => set === 1n && Math.abs((i % w) - (j % w)) <= MARGIN
                                 && Math.abs(Math.floor(i / w) - Math.floor(j / w)) <= MARGIN)) chosen.push(i);
      const kept = new Set(chosen.length <= most ? chosen : Array.from({length: most}, (_, k) =>
        chosen[Math.floor(k * (chosen.length - 1) / Math.max(1, most - 1))]));
      yield [at, part, labelsOf(part, grid, ids).map((set, i) => kept.has(i) ? set : -1n)];
    }
}

// The crop that shows an object `scale` times as large, with the frame's aspect ratio.
function around({height, width, data}, id, scale) {
  let [top, bottom, left, right] = [height, 0, width, 0];
  data.forEach((value, i) => {
    if (value !== id) return;
    const x = i % width, y = (i - x) / width;
    [top, bottom, left, right] = [Math.min(top, y), Math.max(bottom, y), Math.min(left, x), Math.max(right, x)];
  });
  const side = (low, high, whole) => {
    const length = Math.max(1, round(whole / scale)), first = round((low + high + 1) / 2 - length / 2);
    return [Math.min(Math.max(0, first), whole - length), length];
  };
  const [[y, rows], [x, columns]] = [side(top, bottom, height), side(left, right, width)];
  return {top: y, left: x, rows, columns};
}

// Restricts each connected component of the foreground to objects within reach, in place. A single
// object's components out of its reach become background, unless all are.
export function keepIdentities({data, height, width}, previous, ids, shares) {
  const size = height * width, alone = ids.length === 1, foreground = new Uint8Array(size);
  for (let i = 0; i < size; i++) foreground[i] = data[i] < 1 - THRESHOLD;
  const {count, parts} = components({height, width, data: foreground});
  const near = ids.map(id => {  // null: it vanished, and may re-appear anywhere
    const area = previous.data.filter(x => x === id).length;
    if (area <= VANISHED * shares[id] * size) return null;
    const reach = Math.max(MIN_REACH, (alone ? REACH_ALONE : REACH) * Math.sqrt(shares[id] * size));
    const reached = new Uint8Array(count);
    extrude(previous, id, reach).forEach((inside, i) => { if (inside) reached[parts[i]] = 1; });
    return reached;
  });
  if (alone && !near[0]?.subarray(1).some(Boolean)) return;
  for (let i = 0; i < size; i++) {
    const part = parts[i], free = !alone && !near.some(reached => reached?.[part]);
    if (!part || free || near.every(reached => !reached || reached[part])) continue;
    if (alone) { data[i] += data[i + size]; data[i + size] = 0; continue; }
    const kept = near.map((reached, k) => !reached || reached[part] ? data[(k + 1) * size + i] + TINY : 0);
    const whole = (1 - data[i]) / kept.reduce((a, b) => a + b);
    kept.forEach((value, k) => { data[(k + 1) * size + i] = value * whole; });
  }
}

// Turns an object's probability outside its extruded previous mask into background, in place.
export function removeOutliers({data, height, width}, previous, ids, shares, distance) {
  const size = height * width;
  ids.forEach((id, k) => {
    const area = previous.data.filter(x => x === id).length;
    if (area <= VANISHED * shares[id] * size) return;
    extrude(previous, id, distance).forEach((inside, i) => {
      if (!inside) { data[i] += data[(k + 1) * size + i]; data[(k + 1) * size + i] = 0; }
    });
  });
}

// The mask of probabilities: foreground first, then the most probable object.
export function decide({channels, height, width, data}, ids) {
  const size = height * width, out = new Uint8Array(size);
  for (let i = 0; i < size; i++) {
    if (!(data[i] < 1 - THRESHOLD)) continue;
    let best = 1;
    for (let k = 2; k < channels; k++) if (data[k * size + i] > data[best * size + i]) best = k;
    out[i] = ids[best - 1];
  }
  return {height, width, data: out};
}

// A mask as run lengths, for keeping those of a whole clip: [value, length, value, length, ...].
export function pack({height, width, data}) {
  const runs = [];
  for (let i = 0, start = 0; i < data.length; start = i) {
    while (i < data.length && data[i] === data[start]) i++;
    runs.push(data[start], i - start);
  }
  return {height, width, runs: Uint32Array.from(runs)};
}

export function unpack({height, width, runs}) {
  const data = new Uint8Array(height * width);
  for (let k = 0, i = 0; k < runs.length; i += runs[k + 1], k += 2) data.fill(runs[k], i, i + runs[k + 1]);
  return {height, width, data};
}

// A packed mask without an object.
export const without = (id, {runs, ...mask}) => ({...mask, runs: runs.map((value, k) => k % 2 || value !== id ? value : 0)});

// The colour of an object id in DAVIS masks: its bits, spread over red, green and blue.
export function colour(id) {
  const rgb = [0, 0, 0];
  for (let bit = 7, rest = id; rest; bit--, rest >>= 3) rgb.forEach((_, c) => { rgb[c] |= (rest >> c & 1) << bit; });
  return rgb;
}

const CRCS = Uint32Array.from({length: 256}, (_, i) => {
  for (let k = 0; k < 8; k++) i = i & 1 ? 0xEDB88320 ^ i >>> 1 : i >>> 1;
  return i;
});

function crc(bytes) {
  let sum = -1;
  for (const byte of bytes) sum = CRCS[(sum ^ byte) & 255] ^ sum >>> 8;
  return (sum ^ -1) >>> 0;
}

// Concatenates bytes, texts and numbers given as [value, number of bytes].
function joined(parts, littleEndian) {
  const chunks = parts.map(part => {
    if (typeof part === 'string') return new TextEncoder().encode(part);
    if (!Array.isArray(part)) return part;
    const bytes = Array.from({length: part[1]}, (_, i) => Math.floor(part[0] / 256 ** i) & 255);
    return Uint8Array.from(littleEndian ? bytes : bytes.reverse());
  });
  const out = new Uint8Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
  chunks.reduce((at, chunk) => { out.set(chunk, at); return at + chunk.length; }, 0);
  return out;
}

// A mask as the bytes of a palette PNG with DAVIS' colours.
export async function png({height, width, data}) {
  const lines = new Uint8Array(height * (width + 1));
  for (let y = 0; y < height; y++) lines.set(data.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const deflated = new Blob([lines]).stream().pipeThrough(new CompressionStream('deflate'));
  const chunk = (name, content) => {
    const bytes = joined([name, content]);
    return joined([[content.length, 4], bytes, [crc(bytes), 4]]);
  };
  return joined([Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10),
    chunk('IHDR', joined([[width, 4], [height, 4], Uint8Array.of(8, 3, 0, 0, 0)])),
    chunk('PLTE', Uint8Array.from(Array.from({length: 256}, (_, id) => colour(id)).flat())),
    chunk('IDAT', new Uint8Array(await new Response(deflated).arrayBuffer())), chunk('IEND', new Uint8Array())]);
}

// A ZIP archive, without compression, of [name, bytes] pairs.
export function zip(files) {
  const parts = [], index = [];
  let offset = 0;
  for (const [name, bytes] of files) {
    const length = new TextEncoder().encode(name).length;
    // version 2.0, UTF-8 names, stored, 1 January 1980
    const common = [[20, 2], [0x800, 2], [0, 2], [0, 2], [33, 2], [crc(bytes), 4], [bytes.length, 4],
      [bytes.length, 4], [length, 2], [0, 2]];
    const entry = joined([[0x04034B50, 4], ...common, name, bytes], true);
    index.push(joined([[0x02014B50, 4], [20, 2], ...common, [0, 2], [0, 2], [0, 2], [0, 4], [offset, 4], name], true));
    parts.push(entry);
    offset += entry.length;
  }
  const size = index.reduce((sum, entry) => sum + entry.length, 0);
  return joined([...parts, ...index, [0x06054B50, 4], [0, 2], [0, 2], [index.length, 2], [index.length, 2],
    [size, 4], [offset, 4], [0, 2]], true);
}
