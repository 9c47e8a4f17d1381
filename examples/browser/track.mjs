// Tracks objects through a folder of PPM frames, given the first frame's mask as PGM, in Node:
//   node track.mjs EXPORT FRAMES FIRST.pgm OUT [SIZE]
// Writes a PGM per frame, whose values are object ids, and prints the seconds that it took. FFmpeg makes
// the frames: ffmpeg -i CLIP.mp4 FRAMES/%05d.ppm
import {readFile, readdir, writeFile, mkdir} from 'node:fs/promises';
import {join, parse} from 'node:path';
import ort from 'onnxruntime-node';
import {Tracker, load} from './loop.js';

// A binary PPM or PGM of 8 bits as {height, width, data}.
async function readPixels(path) {
  const bytes = await readFile(path);
  const header = /^P[56]\s+(\d+)\s+(\d+)\s+255\s/.exec(bytes.subarray(0, 64).toString('latin1'));
  if (!header) throw new Error(`${path}: expected a binary PPM or PGM of 8 bits`);
  return {width: Number(header[1]), height: Number(header[2]), data: new Uint8Array(bytes.subarray(header[0].length))};
}

const [folder, frames, first, out, size = '480'] = process.argv.slice(2);
if (!out) {
  console.error('usage: node track.mjs EXPORT FRAMES FIRST.pgm OUT [SIZE]');
  process.exit(2);
}
await mkdir(out, {recursive: true});
const tracker = new Tracker(await load(ort, name => readFile(join(folder, name))), Number(size));
for (const name of (await readdir(frames)).filter(name => name.endsWith('.ppm')).sort()) {
  const start = performance.now(), frame = await readPixels(join(frames, name));
  const mask = await tracker.step(frame, tracker.state ? null : await readPixels(first));
  const header = `P5\n${mask.width} ${mask.height}\n255\n`;
  await writeFile(join(out, `${parse(name).name}.pgm`), Buffer.concat([Buffer.from(header), mask.data]));
  console.log(name, ((performance.now() - start) / 1000).toFixed(3));
}
