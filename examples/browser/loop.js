// Tracks objects through a video with the graphs of an export: lite.py's loop in JavaScript.
// Runs in a browser and in Node; docs/lite.md has the contract of the graphs.
import {CLOSER, closer, crop, decide, fromPixels, keepIdentities, labelsOf, nearest, planes, removeOutliers,
  resize, round} from './picture.js';

// As in network/state.py and media/images.py, which say what they are for
const MEM_EVERY = 5, MEMBERS = 16, LEAST_GROUPS = 64, ENLARGED = 2;

// The network of an export. `ort` is onnxruntime-web or onnxruntime-node; `read` returns a promise of
// the bytes of a file of the export; `options` are an InferenceSession's.
export async function load(ort, read, options = {}) {
  const description = JSON.parse(new TextDecoder().decode(await read('videomatch.json')));
  const sessions = {};
  for (const name of Object.keys(description.graphs))
    sessions[name] = await ort.InferenceSession.create(await read(`${name}.onnx`), options);
  return new Network(ort, sessions, description.network);
}

class Network {
  constructor(ort, sessions, settings) { Object.assign(this, {ort, sessions, ...settings}); }

  // Runs a graph on those of the inputs that it has; outputs that are a state's fields lose their prefix.
  async run(graph, inputs) {
    const session = this.sessions[graph];
    const outputs = await session.run(Object.fromEntries(session.inputNames.map(name => [name, inputs[name]])));
    return Object.fromEntries(session.outputNames.map(name => [name.replace(/^next_/, ''), outputs[name]]));
  }

  tensor(data, shape) {
    return new this.ort.Tensor(data instanceof BigInt64Array ? 'int64' : 'float32', data, shape);
  }

  normalized({channels, height, width, data}) {
    const size = height * width, scale = this.std.map(x => 1 / (255 * x));
    const offset = this.mean.map((x, c) => -x / this.std[c]), out = new Float32Array(data.length);
    for (let c = 0; c < 3; c++)
      for (let i = c * size; i < (c + 1) * size; i++) out[i] = data[i] * scale[c] + offset[c];
    return {channels, height, width, data: out};
  }

  // Features of a normalised picture on a grid of locations, by default that of its size.
  async encode(picture, grid) {
    grid ??= [picture.height, picture.width].map(side => Math.max(1, round(side * this.zoom / this.stride)));
    const {channels, height, width, data} = resize(picture, grid.map(side => side * this.stride));
    return this.run('encode', {image: this.tensor(data, [1, channels, height, width])});
  }

  // The empty state before the first frame: the inputs of `start` that no frame has.
  blank([h, w], objects) {
    const s = Math.min(MEMBERS, Math.max(1, Math.floor(h * w / LEAST_GROUPS)));
    const g = Math.max(MEMBERS, Math.ceil(h * w / s)), m = s + (objects + 1) * Math.max(1, Math.floor(s / 4));
    const sizes = {f: 0, r: 0, v: 0, m, g, s, o: objects + (objects > 1), n: objects + 1, h, w, c: h * w,
      y: h * this.widths.side, x: w * this.widths.side};
    const fields = {};
    for (const {name, type, shape} of this.sessions.start.inputMetadata) {
      const numbers = shape.map(side => sizes[side] ?? side), length = numbers.reduce((a, b) => a * b, 1);
      fields[name] = this.tensor(type === 'int64' ? new BigInt64Array(length) : new Float32Array(length), numbers);
    }
    return fields;
  }

  // The state after a reference frame. Its views are the frame and zoomed crops of its objects; objects
  // that are not in the mask have empty ones, as shapes must not depend on values.
  async refer(state, picture, mask, ids) {
    const frame = await this.encode(picture), grid = frame.local_key.dims.slice(1, 3), views = [];
    const pixels = grid.map(side => side * this.widths.side), n = ids.length + 1;
    const add = ({key, shared}, part, labels) => views.push({key: key.data, shared: shared.data, labels,
      masks: resize(planes(part, [0, ...ids]), pixels, 'antialiased').data});
    add(frame, mask, labelsOf(mask, grid, ids));
    for (const [at, part, labels] of closer(nearest(mask, [picture.height, picture.width]), grid, ids))
      add(await this.encode(crop(picture, at), grid), part, labels);
    const {masks, labels} = views[0], none = {masks: masks.map(() => 0), labels: labels.map(() => -1n)};
    while (views.length < 1 + CLOSER.length * ids.length) views.push({...views[0], ...none});
    const stack = (name, shape) => {
      const length = views[0][name].length, out = new views[0][name].constructor(views.length * length);
      views.forEach((view, i) => out.set(view[name], i * length));
      return this.tensor(out, [views.length, ...shape]);
    };
    state ??= this.blank(grid, ids.length);
    return this.run('start', {...state, ...frame,
      key: stack('key', frame.key.dims.slice(1)), shared: stack('shared', frame.shared.dims.slice(1)),
      masks: stack('masks', [n, ...pixels]), labels: stack('labels', grid)});
  }

  // Probabilities of a frame at the size of `picture`, as {channels, height, width, data}.
  async predict(state, features, {height, width}) {
    const {data, dims: [channels, h, w]} = (await this.run('step', {...state, ...features})).logits;
    const out = resize({channels, height: h, width: w, data}, [height, width], 'cubic'), size = height * width;
    for (let i = 0; i < size; i++) {
      let most = -Infinity, sum = 0;
      for (let j = i; j < out.data.length; j += size) most = Math.max(most, out.data[j]);
      for (let j = i; j < out.data.length; j += size) sum += out.data[j] = Math.exp(out.data[j] - most);
      for (let j = i; j < out.data.length; j += size) out.data[j] /= sum;
    }
    return out;
  }
}

// Takes the frames of a video in order, with user masks for the first and any later ones.
export class Tracker {
  constructor(network, size = 480) {
    Object.assign(this, {network, size, state: null, previous: null, ids: [], shares: {}});
  }

  // A tracker at the same frame, to return to later; arrays are shared.
  copy() { return Object.assign(new Tracker(), this); }

  // The mask of the next frame: {height, width, data} of a canvas' ImageData -> a mask of its size.
  async step(frame, mask = null) {
    const shape = [frame.height, frame.width], scale = Math.min(this.size / Math.min(...shape), ENLARGED);
    const small = shape.map(side => round(side * scale));
    const picture = this.network.normalized(resize(fromPixels(frame), small, scale < 1 ? 'area' : 'linear'));
    const missing = mask?.data.some(Boolean) ? this.ids.filter(id => !mask.data.includes(id)) : [];
    if (mask && !missing.length) return this.#refer(picture, mask);
    if (!this.state) throw new Error('the first frame needs a mask of the objects');
    const features = await this.network.encode(picture);
    const found = await this.network.predict(this.state, features, picture);
    const previous = nearest(this.previous, small);
    keepIdentities(found, previous, this.ids, this.shares);
    removeOutliers(found, previous, this.ids, this.shares, this.network.dilation);
    const predicted = decide(resize(found, shape), this.ids);
    if (mask) {  // objects that a later mask lacks are predicted as usual
      const data = mask.data.map((id, i) => id || (missing.includes(predicted.data[i]) ? predicted.data[i] : 0));
      return this.#refer(picture, {...mask, data});
    }
    const graph = (Number(this.state.frames.data[0]) + 1) % MEM_EVERY ? 'remember' : 'remember_long';
    const probabilities = this.network.tensor(found.data, [found.channels, ...small]);
    this.state = {...this.state, ...await this.network.run(graph, {...this.state, ...features, probabilities})};
    this.previous = decide(found, this.ids);
    return predicted;
  }

  async #refer(picture, mask) {
    const present = [...new Set(mask.data)].filter(Boolean).sort((a, b) => a - b);
    const ids = [...new Set([...this.ids, ...present])];
    if (!ids.length) throw new Error('the mask of the first frame is empty');
    this.state = await this.network.refer(this.state, picture, mask, ids);
    const shares = {...this.shares};  // a copy, because those of the tracker have the same object
    for (const id of present) shares[id] = mask.data.filter(x => x === id).length / mask.data.length;
    return Object.assign(this, {ids, shares, previous: mask}).previous;
  }
}
