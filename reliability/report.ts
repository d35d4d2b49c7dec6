// docs/reliability.md, from the results of a run.

import type { AllocationsOutcome } from './allocations.js'
import type { Delay } from './event_loop.js'
import type { FilesOutcome } from './files.js'
import type { FuzzOutcome } from './fuzz.js'
import type { Slope, SoakOutcome } from './soak.js'
import type { Growth } from './text.js'
import type { WorkersOutcome } from './workers.js'
import type { WritersOutcome } from './writers.js'

export interface Results {
  machine?: string
  date?: string
  fuzz?: FuzzOutcome
  sanitized?: FuzzOutcome
  native?: { driver: string; inputs: number; faults: string[] }
  queue?: { rounds: number; faults: string[] }
  files?: FilesOutcome
  text?: Growth[]
  writers?: WritersOutcome
  allocations?: AllocationsOutcome
  workers?: WorkersOutcome
  slopes?: Slope[]
  soak?: SoakOutcome
  delays?: Delay[]
}

const count = (n: number): string => n.toLocaleString('en').replaceAll(',', ' ')
const mebibytes = (bytes: number): string => `${Math.round(bytes / 2 ** 20)} MiB`
const table = (head: readonly string[], rows: readonly (readonly string[])[]): string =>
  [head, head.map(() => '---'), ...rows].map((row) => `| ${row.join(' | ')} |`).join('\n')

export function pageOf(r: Results): string {
  const sections: string[] = []
  const section = (title: string, ...paragraphs: (string | undefined)[]): void => {
    sections.push([`## ${title}`, ...paragraphs.filter((p) => p !== undefined)].join('\n\n'))
  }
  const faults = (list: readonly string[]): string =>
    list.length ? `**Faults: ${list.length}.**` : 'No faults.'
  if (r.fuzz)
    section(
      'Hostile calls',
      `${count(r.fuzz.calls)} calls of ${Object.keys(r.fuzz.byName).length} exported functions, constructors and methods, on small random arguments of which one to three places were spoiled: other types, numbers at their limits, getters and proxies that throw or dispose of what they find, arrays of other realms, detached and shared memory, tensors that are disposed, of another device or views of each other. ${count(r.fuzz.returned)} returned and their results were read; ${count(r.fuzz.refused)} were refused, each with a \`P2RError\`. A tensor that no call was given stayed as it was, and the device computed as before. ${faults(r.fuzz.faults)}`,
      r.sanitized &&
        `The same under AddressSanitizer and UndefinedBehaviorSanitizer, with an addon built for them: ${count(r.sanitized.calls)} calls. ${faults(r.sanitized.faults)}`,
    )
  if (r.native)
    section(
      'Native functions',
      `The C++ that computes sizes and indices from what callers and files say (weights of a resampling, outlines, grids of patches, recorded cases), called by itself under AddressSanitizer and UndefinedBehaviorSanitizer with ${count(r.native.inputs)} inputs by ${r.native.driver}: indices stay inside, weights sum to 1, places of tokens are all different. ${faults(r.native.faults)}`,
    )
  if (r.queue)
    section(
      'Queue and pool',
      `The CPU device's queue and its pool of threads, driven under ThreadSanitizer by four threads with devices of their own, in ${count(r.queue.rounds)} rounds: loops whose items each run once, chains of every kind of work whose results are checked, devices that end with work queued. ${faults(r.queue.faults)}`,
    )
  if (r.files)
    section(
      'Broken files',
      `${count(r.files.mutations)} files with one to four errors: bits, bytes, lengths and numbers at their limits, cuts, repeats, pieces of themselves elsewhere. ${count(r.files.refused)} were refused with a \`P2RError\`, ${count(r.files.read)} could be read. The largest growth of the process's memory over one of them was ${mebibytes(r.files.largestGrowth)}. ${faults(r.files.faults)}`,
      table(
        ['kind', 'mutations'],
        Object.entries(r.files.byKind).map(([kind, n]) => [kind, count(n)]),
      ),
    )
  if (r.text)
    section(
      'Long texts',
      `How the time of reading a text grows with its length: ${r.text.length} pairs of a reader and a text made against it. What is linear takes twice the time for twice the length. The five steepest, in milliseconds:`,
      table(
        ['reader and text', ...r.text[0]!.sizes.map((n) => `${count(n)} characters`)],
        r.text.slice(0, 5).map(({ name, times }) => [name, ...times.map((t) => t.toFixed(2))]),
      ),
    )
  if (r.writers)
    section(
      'Interrupted writes',
      `\`saveTensors\`, \`saveImage\` and \`saveRollouts\` over a file that is there already: ${r.writers.full} times with a disk that fills up in the middle, ${r.writers.killed} times in a process that was killed, ${r.writers.readOnly} times where nothing may be written. Afterwards the file was the old one or the new one, whole. ${faults(r.writers.faults)}`,
    )
  if (r.allocations)
    section(
      'Failed allocations',
      `A session of ${r.allocations.calls} calls, among them one of each function and method, in which one allocation fails after another: those that the addon makes in C++ on the thread that calls, and the device's memory. ${count(r.allocations.failed)} failed; after ${count(r.allocations.refused)} of them the call was refused with ERR_MEMORY, after the others it did without. No call kept memory, and the device computed as before. Allocations on the device's own threads are not among them. ${faults(r.allocations.faults)}`,
    )
  if (r.workers)
    section(
      'Workers',
      `${count(r.workers.workers)} worker threads, eight at once; ${count(r.workers.terminated)} of them were terminated while they computed or while the package was still being loaded. The slowest termination took ${Math.round(r.workers.slowest)} ms. ${faults(r.workers.faults)}`,
    )
  if (r.slopes)
    section(
      'Memory',
      `What ${count(r.slopes[0]?.rounds ?? 0)} rounds of each of ${r.slopes.length} functions add to the process, by least squares over the second half, after a collection; the five steepest. Noise of the allocator and the engine is of either sign: the flattest is at ${r.slopes.at(-1)?.bytesPerRound.toFixed(0)}. Bytes that stay on the device: ${r.slopes.reduce((s, x) => s + x.liveBytes, 0)}.`,
      table(
        ['function', 'bytes a round'],
        r.slopes.slice(0, 5).map((s) => [`\`${s.name}\``, s.bytesPerRound.toFixed(1)]),
      ),
    )
  if (r.soak)
    section(
      'Soak',
      `${count(r.soak.calls)} calls of all operations in turn in ${count(r.soak.seconds)} seconds, each made twice with results equal to the bit. ${faults(r.soak.faults)}`,
    )
  if (r.delays)
    section(
      'Event loop',
      'The longest that timers waited meanwhile, in milliseconds:',
      table(
        ['work', 'seconds', 'longest delay'],
        r.delays.map(({ name, seconds, longest }) => [
          name,
          seconds.toFixed(1),
          longest.toFixed(0),
        ]),
      ),
    )
  return `# Reliability

The library promises: no call ends the process, no result is silently wrong, every error is a \`P2RError\`. What is done to find out:
\`npm run reliability\` tries to break it and counts; \`-- --help\` lists the parts. \`npm test\` runs a small form of most of them. The figures
are of ${r.machine}, ${r.date}.

${sections.join('\n\n')}
`
}
