// Peers in Python: a process for each script (serve.py documents the protocol), arrays by files.
import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { Readable, Writable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import type { Block } from '../data.js'
import { type Backend, type Peer, PeerAbsent } from '../harness.js'

const folder = fileURLToPath(new URL('../../../bench/peers', import.meta.url))

interface Script {
  versions: Record<string, string>
  ask(message: object): Promise<{ ms?: number }>
  stop(): void
}

/** By script, threads and device. */
const scripts = new Map<string, Promise<Script>>()

/** Ends every script's process. */
export async function stopPython(): Promise<void> {
  const running = [...scripts.values()]
  scripts.clear()
  for (const script of await Promise.allSettled(running))
    if (script.status === 'fulfilled') script.value.stop()
}

/** Package versions reported by the scripts that ran. */
export async function pythonVersions(): Promise<Record<string, string>> {
  const out = {}
  for (const script of await Promise.allSettled(scripts.values()))
    if (script.status === 'fulfilled') Object.assign(out, script.value.versions)
  return out
}

type Child = ChildProcessByStdio<Writable, Readable, Readable>

/** The first Python with the script's packages; PeerAbsent names those that the last one lacked. */
async function started(script: string, threads: number, device: string): Promise<Script> {
  const pythons = process.env.PYTHON ? [process.env.PYTHON] : ['python3', '/usr/bin/python3']
  let why = ''
  for (const python of pythons) {
    const child: Child = spawn(
      python,
      [join(folder, 'serve.py'), script, String(threads), device],
      {
        stdio: ['pipe', 'pipe', 'pipe'],
        env: {
          ...process.env,
          OMP_NUM_THREADS: String(threads),
          PYTHONDONTWRITEBYTECODE: '1',
          // The allocator keeps freed memory, as our pool does; else page faults of results would be measured.
          MALLOC_MMAP_MAX_: '0',
          MALLOC_TRIM_THRESHOLD_: '-1',
        },
      },
    )
    const first = await opened(child)
    if (typeof first !== 'string') return first
    child.kill()
    why = first
  }
  throw new PeerAbsent(`${script}.py was skipped: ${why}.`)
}

/** The process once it has reported its versions; the reason if it could not. */
async function opened(child: Child): Promise<Script | string> {
  const lines = createInterface({ input: child.stdout })
  const waiting: ((line: string | undefined) => void)[] = []
  let errors = ''
  let ended = false
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    errors = (errors + text).slice(-2000)
  })
  lines.on('line', (line) => waiting.shift()?.(line))
  const end = () => {
    ended = true
    for (const next of waiting.splice(0)) next(undefined)
  }
  child.on('error', (error) => {
    errors += error.message
    end()
  })
  child.on('close', end)
  child.stdin.on('error', end)

  const answer = async (): Promise<Record<string, unknown>> => {
    const line = ended
      ? undefined
      : await new Promise<string | undefined>((resolve) => waiting.push(resolve))
    if (line !== undefined) return JSON.parse(line)
    return { absent: `its process ended: ${errors.trim().split('\n').at(-1) ?? ''}` }
  }
  const hello = await answer()
  if (hello.absent !== undefined) return String(hello.absent).replace(/\.$/, '')
  return {
    versions: hello.versions as Record<string, string>,
    async ask(message) {
      child.stdin.write(`${JSON.stringify(message)}\n`)
      const said = await answer()
      if (said.error !== undefined || said.absent !== undefined)
        throw new PeerAbsent(String(said.error ?? said.absent))
      return said
    },
    stop: () => {
      child.stdin.end()
      child.kill()
    },
  }
}

let runs = 0

/** A function of `bench/peers/<script>.py`, which is given the arrays and options. */
export function pythonPeer(peer: {
  name: string
  script: string
  call: string
  tolerance: number
  backends: readonly Backend[]
  arrays: () => Record<string, Block>
  options?: object
  slow?: boolean
}): Peer {
  const { name, script, call, tolerance, backends, slow = false } = peer
  return {
    name,
    tolerance,
    backends,
    slow,
    async open(threads, device) {
      const key = `${script} ${threads} ${device}`
      if (!scripts.has(key)) scripts.set(key, started(script, threads, device))
      const { ask } = await scripts.get(key)!
      const id = ++runs
      const said = async (message: object) => {
        try {
          return await ask(message)
        } catch (error) {
          if (error instanceof PeerAbsent)
            throw new PeerAbsent(`${name} was skipped: ${error.message.replace(/\.$/, '')}.`)
          throw error
        }
      }
      const scratch = mkdtempSync(join(tmpdir(), 'p2r-bench-'))
      try {
        const arrays: Record<string, object> = {}
        for (const [key, { data, ...rest }] of Object.entries(peer.arrays())) {
          const file = join(scratch, key)
          writeFileSync(file, data)
          arrays[key] = { file, ...rest }
        }
        await said({ open: id, call, arrays, options: peer.options ?? {} })
      } finally {
        rmSync(scratch, { recursive: true })
      }
      return {
        async run() {
          const scratch = mkdtempSync(join(tmpdir(), 'p2r-bench-'))
          try {
            const file = join(scratch, 'answer')
            await said({ answer: id, file })
            return new Float32Array(new Uint8Array(readFileSync(file)).buffer)
          } finally {
            rmSync(scratch, { recursive: true })
          }
        },
        async time(runs) {
          return (await said({ time: id, runs })).ms!
        },
        close: () => void ask({ close: id }).catch(() => {}),
      }
    },
  }
}
