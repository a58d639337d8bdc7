// What the pages do beyond links and forms. Without it everything works but what is live.
'use strict'

const $ = (id) => document.getElementById(id)

// Times: how long ago, or how long until, kept current.

const relative = new Intl.RelativeTimeFormat('en', { numeric: 'auto', style: 'short' })
const UNITS = [['day', 86400], ['hour', 3600], ['minute', 60], ['second', 1]]

function age(seconds) {
  const [unit, size] = UNITS.find(([, size]) => Math.abs(seconds) >= size) ?? UNITS[3]
  return relative.format(Math.trunc(seconds / size), unit)
}

function tellTime(element) {
  const text = age((Date.parse(element.dateTime) - Date.now()) / 1000)
  if (element.textContent !== text) element.textContent = text
}

const tellTimes = () => document.querySelectorAll('time[datetime]').forEach(tellTime)

// Before the browser paints, so that nobody sees the text without a script.
new MutationObserver(tellTimes).observe(document.body, { childList: true, subtree: true })
setInterval(tellTimes, 1000)
tellTimes()

// The stream of changes, and whether it works.

const RETRY = 3000

function connected(text) {
  const element = $('connection')
  if (element.textContent !== text) element.textContent = text
  element.classList.toggle('lost', text !== '')
}

const LOST = 'The keeper does not answer. Trying again …'

addEventListener('htmx:sse:after:connection', () => connected(''))
addEventListener('htmx:sse:error', () => connected(LOST))

// A stream that never began does not begin again by itself.
function begin(event) {
  const stream = event.target
  if (stream.id !== 'stream') return
  connected(LOST)
  setTimeout(() => {
    const again = stream.cloneNode()
    stream.replaceWith(again)
    htmx.process(again)
  }, RETRY)
}

addEventListener('htmx:error', begin)
addEventListener('htmx:response:error', begin)
addEventListener('version', (event) => {
  // The elements and scripts of another version may differ.
  if (event.detail.data !== document.body.dataset.version) location.reload()
})
addEventListener('ended', (event) => {
  const notice = document.createElement('p')
  notice.className = 'notice'
  notice.textContent = event.detail.data
  $('notices').replaceChildren(notice)
  event.target.remove()
})

// Questions are asked in a dialog instead of a page.

let asked = null

function closeDialog() {
  // The event of its closing comes later; until then, it must not look like a new question.
  $('dialog').replaceChildren()
  $('dialog').close()
}

addEventListener('click', (event) => {
  const control = event.target.closest('[hx-target="#dialog"]')
  if (control) asked = control.id || control.closest('[id]')?.id
  if (event.target.closest('[data-close]') && $('dialog').open) {
    event.preventDefault()
    closeDialog()
  }
})
addEventListener('htmx:after:swap', () => {
  const dialog = $('dialog')
  if (dialog.childElementCount && !dialog.open) {
    dialog.showModal()
    dialog.querySelector('[autofocus]')?.focus()
  } else if (asked && document.activeElement === document.body) {
    // The row from which somebody asked is gone.
    $('main').focus()
  }
})
addEventListener('htmx:after:request', (event) => {
  if (event.target.closest?.('#dialog')) closeDialog()
})
$('dialog').addEventListener('close', () => {
  $('dialog').replaceChildren()
  // What has asked may be gone, such as the button of a server that stops.
  const there = asked && $(asked)
  const focused = there?.matches('a, button') ? there : there?.querySelector('a, button')
  ;(focused ?? $('main')).focus()
})

// Choosing many servers.

addEventListener('change', (event) => {
  if (event.target.id !== 'all') return
  for (const box of document.querySelectorAll('input[name="name"]')) box.checked = event.target.checked
})

// Keys.

const GOES = { s: '/dashboard/', a: '/dashboard/activity', k: '/dashboard/keeper', t: '/dashboard/access' }
let goes = false

function step(by) {
  const links = [...document.querySelectorAll('tbody .name a')]
  const at = links.indexOf(document.activeElement?.closest('tr')?.querySelector('.name a'))
  links[Math.min(Math.max(at + by, 0), links.length - 1)]?.focus()
}

const KEYS = {
  '/': () => $('search')?.focus(),
  '?': () => $('keys').showModal(),
  g: () => { goes = true; setTimeout(() => { goes = false }, 1500) },
  j: () => step(1),
  k: () => step(-1),
  n: () => $('new')?.click()
}

addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return
  if (event.target.matches('input:not([type="checkbox"]), textarea, select')) {
    if (event.key === 'Escape') event.target.blur()
    return
  }
  if (document.querySelector('dialog[open]')) return
  if (goes && GOES[event.key]) location.assign(GOES[event.key])
  else if (KEYS[event.key]) {
    event.preventDefault()
    KEYS[event.key]()
  }
})

// The log of a server: its newest lines, which can be paused and searched.

const MOST = 5000
let lines = []

function showLog() {
  const log = $('log')
  if (!log || $('log-pause').querySelector('input').checked) return
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40
  const wanted = $('log-search').value.toLowerCase()
  const shown = wanted ? lines.filter((line) => line.toLowerCase().includes(wanted)) : lines
  log.textContent = shown.join('\n')
  if (atEnd) log.scrollTop = log.scrollHeight
}

addEventListener('log', (event) => {
  const came = JSON.parse(event.detail.data)
  lines = (came.again ? came.lines : lines.concat(came.lines)).slice(-MOST)
  showLog()
})
if ($('log')) {
  for (const id of ['log-search', 'log-pause']) {
    $(id).hidden = false
    $(id).addEventListener('input', showLog)
  }
}
