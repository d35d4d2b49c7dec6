// Runs the compiler that the arguments name and fails, where ptxas -v reports it, on a kernel that
// spills registers or whose wgmma instructions were serialised. A kernel that is meant to says so in
// its source file: `// ptxas: <kernel> spills` or `// ptxas: <kernel> serialises`. A line `// ptxas:
// <kernel> overlaps 80 % of its exponentials` demands that in the machine code so many stand where a
// product by wgmma is in flight (scripts/sass.mjs); `<kernel><64>` of those with 64 among their
// template arguments. CMake puts this in front of each compilation of a STRICT build.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { overlaps } from './sass.mjs'

const [command, ...args] = process.argv.slice(2)
const source = args.find((arg) => arg.endsWith('.cu'))
const text = source ? readFileSync(source, 'utf8') : ''
const demands = [
  ...text.matchAll(/^\/\/ ptxas: (\w+)(?:<(\d+)>)? overlaps (\d+) % of its exponentials$/gm),
].map(([, kernel, argument, percent]) => ({ kernel, argument, percent: Number(percent) }))

// The compiler's intermediate files, which a cache of compilations does not bring back.
const kept = demands.length ? mkdtempSync(join(tmpdir(), 'p2r-sass-')) : ''
const { status, error, stdout, stderr } = spawnSync(
  command,
  kept ? [...args, '--keep', `--keep-dir=${kept}`] : args,
  {
    encoding: 'utf8',
    maxBuffer: 1 << 28,
    env: kept ? { ...process.env, CCACHE_DISABLE: '1' } : process.env,
  },
)
if (error) throw error
process.stdout.write(stdout)

const faults = source ? inspect(stderr) : []
if (kept) {
  try {
    if (status === 0) faults.push(...exposed())
  } catch (problem) {
    faults.push(problem.message)
  }
  rmSync(kept, { recursive: true })
}
// ptxas's own account of each kernel is noise when all is well.
process.stderr.write(
  stderr
    .split('\n')
    .filter((line) => !/^ptxas info|^\s+\d+ bytes stack frame/.test(line))
    .join('\n'),
)
for (const fault of faults) console.error(`${source}: ${fault}`)
process.exit(status || (faults.length ? 1 : 0))

function isOf(kernel, symbol) {
  return symbol.includes(`${kernel.length}${kernel}`)
}

function exposed() {
  const [ptx, cubin] = ['ptx', 'cubin'].map((kind) => {
    const name = readdirSync(kept).find((file) => file.endsWith(`90a.${kind}`))
    if (!name) throw new Error(`${source}: there is no ${kind} of sm_90a`)
    return readFileSync(join(kept, name))
  })
  const found = overlaps(cubin, ptx.toString())
  return demands.flatMap(({ kernel, argument, percent }) => {
    const own = found.filter(
      ([symbol]) => isOf(kernel, symbol) && (!argument || symbol.includes(`Li${argument}E`)),
    )
    if (!own.length)
      return [
        `there is no kernel ${kernel}${argument ? `<${argument}>` : ''} with wgmma for sm_90a`,
      ]
    return own
      .filter(([, share]) => !(100 * share >= percent))
      .map(
        ([symbol, share]) =>
          `${symbol} overlaps ${Math.floor(100 * share)} % of its exponentials, not ${percent} %`,
      )
  })
}

function inspect(log) {
  const declared = [...text.matchAll(/^\/\/ ptxas: (\w+) (spills|serialises)/gm)]
  const allowed = (symbol, what) =>
    declared.some(([, name, verb]) => verb === what && isOf(name, symbol))
  const faults = []
  let kernel = ''
  let target = ''
  for (const line of log.split('\n')) {
    target = line.match(/ for '(sm_\w+)'/)?.[1] ?? target
    kernel = line.match(/(?:entry function|Function properties for) '?(\w+)/)?.[1] ?? kernel
    const [, stores, loads] = line.match(/(\d+) bytes spill stores, (\d+) bytes spill loads/) ?? []
    if (Number(stores) + Number(loads) > 0 && !allowed(kernel, 'spills'))
      faults.push(`${kernel} (${target}) spills: ${line.trim()}`)
    if (/\(C75\d\d\)/.test(line)) {
      const named = line.match(/function '?(\w+)/)?.[1] ?? kernel
      if (!allowed(named, 'serialises')) faults.push(`${named} (${target}): ${line.trim()}`)
    }
  }
  return faults
}
