// Turns boxes and points in one frame into a mask, as tracking/prompting.py and network/prompt_maps.py,
// which say what the constants are for.
import {components, crop, fromPixels, resize, round} from './picture.js';

const CROP_AREA = 320 * 480, CROP_MULTIPLE = 32, CROP_MARGIN = 0.4, MIN_CROP = 0.2, MIN_ASPECT = 0.6;
const MAX_CROPS = 3, SAME_CROP = 0.6, BOX_TOLERANCE = 0.1;
const MAPS = 10, NEAR = 8, FAR = 64;

// The mask of the prompted object: a Uint8Array of 0 and 1.
// `frame` is {height, width, data} of a canvas' ImageData. `prompts` are in pixels: boxes of x, y, width,
// height; points and negativePoints of x, y; and `mask`, the current one, or null.
export async function predictMask(network, frame, prompts) {
  const picture = fromPixels(frame);
  let current = prompts, at = cropAround(prompts, frame), mask;
  for (let i = 0; i < MAX_CROPS; i++) {
    mask = selectComponents(await predictCrop(network, picture, current, at), prompts);
    current = {...prompts, mask: mask.data};
    const previous = at;
    at = cropAround(current, frame);
    if (!mask.data.includes(1) || cropIou(previous, at) > SAME_CROP) break;
  }
  return mask.data;
}

// The mask predicted in a crop, resized to about CROP_AREA; 0 outside of it.
async function predictCrop(network, picture, prompts, at) {
  const scale = Math.sqrt(CROP_AREA / (at.rows * at.columns));
  const [rows, columns] = [at.rows, at.columns].map(side =>
    Math.max(1, round(side * scale / CROP_MULTIPLE)) * CROP_MULTIPLE);
  const kind = rows * columns < at.rows * at.columns ? 'area' : 'linear';
  const patch = network.normalized(resize(crop(picture, at), [rows, columns], kind));
  const tall = rows / at.rows, wide = columns / at.columns;
  const move = ([x, y]) => [(x + 0.5 - at.left) * wide - 0.5, (y + 0.5 - at.top) * tall - 0.5];
  const moved = {points: prompts.points.map(move), negativePoints: prompts.negativePoints.map(move),
    boxes: prompts.boxes.map(([x, y, w, h]) => [(x - at.left) * wide, (y - at.top) * tall, w * wide, h * tall]),
    mask: prompts.mask && crop({height: picture.height, width: picture.width, data: prompts.mask}, at)};
  const image = network.tensor(patch.data, [1, 3, rows, columns]);
  const features = await network.run('encode', {image});
  const coarse = features.local_key.dims.slice(1, 3), fine = features.level0.dims.slice(2);
  const clicked = (points, [h, w]) => network.tensor(BigInt64Array.from(points, ([x, y]) => BigInt(
    clamp(Math.floor((y + 0.5) * h / rows), h) * w + clamp(Math.floor((x + 0.5) * w / columns), w))), [points.length]);
  const {logits} = await network.run('prompt', {...features, image,
    prompt_maps: network.tensor(promptMaps(moved, [rows, columns], fine), [1, MAPS, ...fine]),
    points: clicked(moved.points, coarse), negative_points: clicked(moved.negativePoints, coarse),
    fine_points: clicked(moved.points, fine), fine_negative_points: clicked(moved.negativePoints, fine)});
  const [height, width] = logits.dims;
  const large = resize({channels: 1, height, width, data: logits.data}, [at.rows, at.columns]);
  const data = new Uint8Array(picture.height * picture.width);
  large.data.forEach((logit, i) => {
    data[(at.top + Math.floor(i / at.columns)) * picture.width + at.left + i % at.columns] = logit > 0;
  });
  return {height: picture.height, width: picture.width, data};
}

const clamp = (i, count) => Math.min(Math.max(i, 0), count - 1);

// Ten maps of the prompts in a picture of [rows, columns] at [h, w] locations, see network/prompt_maps.py.
function promptMaps({boxes, points, negativePoints, mask}, [rows, columns], [h, w]) {
  const maps = Array.from({length: MAPS}, () => new Float32Array(h * w));
  if (mask) {
    maps[8].fill(1);
    maps[9] = resize({...mask, data: Float32Array.from(mask.data)}, [h, w], 'antialiased').data;
  }
  for (let i = 0; i < h * w; i++) {
    const x = (i % w + 0.5) * columns / w, y = (Math.floor(i / w) + 0.5) * rows / h;
    const depths = boxes.map(([left, top, width, height]) => [
      Math.min(x - left, left + width - x) / Math.max(width, 1), Math.min(y - top, top + height - y) / Math.max(height, 1)]);
    if (boxes.length) {
      const [across, down] = depths.reduce((a, b) => Math.min(...b) > Math.min(...a) ? b : a).map(d => Math.max(d, -1));
      [maps[0][i], maps[1][i], maps[2][i], maps[3][i]] = [1, Math.min(across, down) >= 0, across, down];
    }
    [points, negativePoints].forEach((clicks, k) => {
      const distance = Math.min(Infinity, ...clicks.map(([u, v]) => Math.hypot(x - u - 0.5, y - v - 0.5)));
      maps[4 + 2 * k][i] = Math.exp(-0.5 * (distance / NEAR) ** 2);
      maps[5 + 2 * k][i] = Math.exp(-distance / FAR);
    });
  }
  const out = new Float32Array(MAPS * h * w);
  maps.forEach((map, k) => out.set(map, k * h * w));
  return out;
}

// Removes parts that the user can't have meant: what lies far outside the boxes and, if there are points,
// components that contain none and don't lie mostly in the current mask.
function selectComponents({height, width, data}, {boxes, points, mask}) {
  const inside = (x, y) => boxes.some(([left, top, w, h]) =>
    x >= Math.floor(left - BOX_TOLERANCE * w) && x < Math.ceil(left + w + BOX_TOLERANCE * w)
    && y >= Math.floor(top - BOX_TOLERANCE * h) && y < Math.ceil(top + h + BOX_TOLERANCE * h));
  if (boxes.length) data = data.map((value, i) => value && inside(i % width, Math.floor(i / width)));
  if (!points.length) return {height, width, data};
  const {count, parts} = components({height, width, data});
  const sizes = new Float64Array(count), current = new Float64Array(count);
  parts.forEach((part, i) => { sizes[part]++; if (mask?.[i]) current[part]++; });
  const selected = new Set([...sizes.keys()].filter(part => part && current[part] > 0.5 * sizes[part]));
  for (const [x, y] of points) selected.add(parts[clamp(round(y), height) * width + clamp(round(x), width)]);
  selected.delete(0);  // the background
  return {height, width, data: selected.size ? data.map((_, i) => selected.has(parts[i])) : data};
}

// The crop of a frame around prompts; with points alone the whole frame.
function cropAround({boxes, points, negativePoints, mask}, {height, width}) {
  let extents = boxes.map(([x, y, w, h]) => [x, y, x + w, y + h]);
  const where = mask ? [...mask.keys()].filter(i => mask[i]) : [];
  if (where.length) {
    const columns = where.map(i => i % width), least = (a, b) => Math.min(a, b), most = (a, b) => Math.max(a, b);
    extents.push([columns.reduce(least), Math.floor(where[0] / width),
      columns.reduce(most) + 1, Math.floor(where.at(-1) / width) + 1]);
  }
  if (!extents.length) return {top: 0, left: 0, rows: height, columns: width};
  extents = [...extents, ...[...points, ...negativePoints].map(([x, y]) => [x, y, x + 1, y + 1])];
  const [left, top, right, bottom] = [Math.min, Math.min, Math.max, Math.max].map((choose, i) =>
    choose(...extents.map(extent => extent[i])));
  const least = MIN_CROP * Math.min(height, width), more = 2 * CROP_MARGIN * Math.max(right - left, bottom - top);
  let sides = [bottom - top, right - left].map(side => Math.max(side + more, least));
  sides = sides.map(side => Math.max(side, MIN_ASPECT * Math.max(...sides)));
  const centred = (centre, length, side) => {
    const whole = Math.min(side, Math.ceil(length));
    return [Math.min(Math.max(0, round(centre - whole / 2)), side - whole), whole];
  };
  const [[y, rows], [x, columns]] = [centred((top + bottom) / 2, sides[0], height), centred((left + right) / 2, sides[1], width)];
  return {top: y, left: x, rows, columns};
}

function cropIou(a, b) {
  const overlap = (i, j, k, l) => Math.max(0, Math.min(i + j, k + l) - Math.max(i, k));
  const shared = overlap(a.top, a.rows, b.top, b.rows) * overlap(a.left, a.columns, b.left, b.columns);
  return shared / (a.rows * a.columns + b.rows * b.columns - shared);
}
