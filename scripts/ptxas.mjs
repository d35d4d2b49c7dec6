// Runs the compiler that the arguments name and fails, where ptxas -v reports it, on a kernel that
// spills registers or whose wgmma instructions were serialised. A kernel that is meant to says so in
// its source file: `// ptxas: <kernel> spills` or `// ptxas: <kernel> serialises`. CMake puts this in
// front of each compilation of a STRICT build.
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'

const [command, ...args] = process.argv.slice(2)
const { status, error, stdout, stderr } = spawnSync(command, args, {
  encoding: 'utf8',
  maxBuffer: 1 << 28,
})
if (error) throw error
process.stdout.write(stdout)

const source = args.find((arg) => arg.endsWith('.cu'))
const faults = source ? inspect(stderr, readFileSync(source, 'utf8')) : []
// ptxas's own account of each kernel is noise when all is well.
process.stderr.write(
  stderr
    .split('\n')
    .filter((line) => !/^ptxas info|^\s+\d+ bytes stack frame/.test(line))
    .join('\n'),
)
for (const fault of faults) console.error(`${source}: ${fault}`)
process.exit(status || (faults.length ? 1 : 0))

function inspect(log, text) {
  const declared = [...text.matchAll(/^\/\/ ptxas: (\w+) (spills|serialises)/gm)]
  const allowed = (symbol, what) =>
    declared.some(([, name, verb]) => verb === what && symbol.includes(`${name.length}${name}`))
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
