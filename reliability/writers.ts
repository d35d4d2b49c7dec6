// What is written and then interrupted: by a full disk, a folder that may not be written, or the end of the process. A
// file is then the old one or the new one, whole.
import { spawn, spawnSync } from 'node:child_process'
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'

export interface WritersOutcome {
  /** Interrupted writes, by how. */
  full: number
  killed: number
  readOnly: number
  faults: string[]
}

/** What is written: the body of a program that writes version `v` (1 or 2) to `file`, which `check` reads as text. */
const writers: Readonly<Record<string, { write: string; check: string }>> = {
  saveTensors: {
    write: `await p.saveTensors(file, { a: d.tensor(new Float32Array(400_000).fill(v), [400_000]) }, { v: String(v) })`,
    check: `const { a } = await p.loadTensors(file, d); const x = await a.read()
      const { v } = await p.loadMetadata(file)
      return x.length === 400_000 && x.every((y) => y === Number(v)) ? v : 'torn'`,
  },
  saveImage: {
    write: `const noise = new Uint8Array(700 * 500 * 3).map((_, i) => (i * 2654435761) >>> 24); noise.fill(v, 0, 30)
      await p.saveImage(d.tensor(noise, [500, 700, 3]), file + '.png')`,
    check: `const x = await (await p.loadImage(file + '.png', d)).read()
      return x.length === 700 * 500 * 3 ? String(x[0]) : 'torn'`,
  },
  saveRollouts: {
    write: `const policy = p.functionPolicy(() => ({ text: 'x'.repeat(20_000), tokens: [v], logProbs: [-1] }))
      const answers = p.functionPolicy(() => '<answer>A</answer>')
      const t = new p.PraGrpo({ perceiver: policy, reasoner: answers, device: d, groupSize: 64 })
      const image = d.zeros([32, 32, 3], 'u8')
      await p.saveRollouts(file, await t.rollout([{ image, question: 'q', answerForm: 'mca', truth: 'A' }]))`,
    check: `const b = await p.loadRollouts(file, d); return String(b.items[0].completion.tokens[0])`,
  },
}

const program = (library: string, body: string, file: string, v: number): string => `
  import * as p from '${library}'
  const d = p.openDevice('cpu', { threads: 1 }), file = ${JSON.stringify(file)}, v = ${v}
  const main = async () => { ${body} }
  process.stdout.write(String((await main()) ?? 'done'))`

export async function interruptWriters(
  folder: string,
  kills: number,
  tell: (what: string) => void = () => {},
): Promise<WritersOutcome> {
  const library = new URL('../lib/index.js', import.meta.url).href
  const outcome: WritersOutcome = { full: 0, killed: 0, readOnly: 0, faults: [] }
  const run = (body: string, file: string, v: number, wrap: readonly string[] = []) => {
    const args = [
      ...wrap,
      process.execPath,
      '--input-type=module',
      '-e',
      program(library, body, file, v),
    ]
    return spawnSync(args[0]!, args.slice(1), { encoding: 'utf8' })
  }
  for (const [name, { write, check }] of Object.entries(writers)) {
    const own = join(folder, name)
    const file = join(own, 'f')
    const stateOf = (): string => run(check, file, 0).stdout || 'unreadable'
    const expectWhole = (when: string, allowed: readonly string[]): void => {
      const state = stateOf()
      if (!allowed.includes(state)) outcome.faults.push(`${name}, ${when}: the file is ${state}`)
      const left = readdirSync(own).filter((each) => !/^f(\.png)?$/.test(each))
      // A process that was killed cannot clean up; others must.
      if (!when.startsWith('killed') && left.length)
        outcome.faults.push(`${name}, ${when}: ${left} stay behind`)
    }
    mkdirSync(own, { recursive: true })
    if (run(write, file, 1).status !== 0) {
      outcome.faults.push(`${name} does not write`)
      continue
    }
    tell(`${name}: a full disk`)
    // A limit of the size of files fails as a full disk does, in the middle of a write.
    for (const blocks of [0, 1, 20, 200]) {
      const limited = ['sh', '-c', `trap '' XFSZ; ulimit -f ${blocks}; exec "$@"`, 'sh']
      const { status, stderr } = run(write, file, 2, limited)
      outcome.full++
      if (status !== 0 && !/P2RError/.test(stderr))
        outcome.faults.push(
          `${name}, ${blocks} blocks: ${stderr.split('\n').slice(0, 5).join(' | ')}`,
        )
      expectWhole(`a full disk after ${blocks} blocks`, status === 0 ? ['2'] : ['1'])
      if (status === 0) run(write, file, 1)
    }
    tell(`${name}: a folder that may not be written`)
    if (process.getuid?.() !== 0) {
      chmodSync(own, 0o500)
      const { status, stderr } = run(write, file, 2)
      chmodSync(own, 0o700)
      if (status === 0 || !/P2RError/.test(stderr))
        outcome.faults.push(`${name}, read-only: ${stderr}`)
      outcome.readOnly++
      expectWhole('a read-only folder', ['1'])
    } else {
      // Root may write everywhere but under what is no folder.
      writeFileSync(join(folder, 'plain'), '')
      const { status, stderr } = run(write, join(folder, 'plain', 'f'), 2)
      if (status === 0 || !/P2RError/.test(stderr))
        outcome.faults.push(`${name}, no folder: ${stderr}`)
      outcome.readOnly++
    }
    for (let i = 0; i < kills; i++) {
      tell(`${name}: killed, ${i + 1} of ${kills}`)
      run(write, file, 1)
      await killedAfter(program(library, `while (true) { ${write} }`, file, 2), 150 + 17 * i)
      outcome.killed++
      expectWhole('killed', ['1', '2'])
    }
    if (existsSync(file)) readFileSync(file)
  }
  rmSync(folder, { recursive: true, force: true })
  return outcome
}

async function killedAfter(code: string, milliseconds: number): Promise<void> {
  const child = spawn(process.execPath, ['--input-type=module', '-e', code], { stdio: 'ignore' })
  const ended = new Promise((resolve) => child.on('close', resolve))
  await new Promise((resolve) => setTimeout(resolve, milliseconds))
  child.kill('SIGKILL')
  await ended
}
