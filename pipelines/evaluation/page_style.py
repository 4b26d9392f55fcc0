"""Style and behaviour of the listening page: constants that are put inline, so that the page needs nothing else."""

CSS = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --paper: #ffffff; --ground: #f5f6f8; --accent: #1f5fbf;
  --hit: #17a673; --missed: #e0513a; --false: #8d63c9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1500px; margin: 0 auto; padding: 0 24px 64px; }
header { padding: 28px 0 8px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 32px 0 10px; }
h3 { font-size: 16px; margin: 0; font-family: ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
p { margin: 4px 0; }
.soft { color: var(--soft); }
.panel { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th { font-size: 13px; color: var(--soft); font-weight: 600; }
tbody tr:last-child td { border-bottom: 0; }
td .interval { display: block; font-size: 11.5px; color: var(--soft); }
td .difference { display: block; font-size: 11.5px; color: var(--soft); }
td .difference.good { color: #0c7a53; font-weight: 600; }
td .difference.bad { color: #b93420; font-weight: 600; }
td.best > b { box-shadow: inset 0 -2px 0 #17a67366; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; }
.plots svg { width: 100%; height: auto; display: block; }
nav { position: sticky; top: 0; z-index: 5; background: var(--ground); padding: 8px 0; display: flex; flex-wrap: wrap;
  gap: 6px; align-items: center; border-bottom: 1px solid var(--line); }
nav a { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; color: var(--accent); text-decoration: none;
  padding: 2px 8px; border: 1px solid var(--line); border-radius: 12px; background: var(--paper);
  max-width: 220px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
nav a.here { background: var(--accent); color: #fff; }
.clip { margin-top: 18px; scroll-margin-top: 84px; }
.clip-head { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline; margin-bottom: 10px; }
.clip-head button { margin-left: auto; }
button { font: inherit; font-size: 13px; color: var(--accent); background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; padding: 3px 12px; cursor: pointer; }
button:hover { border-color: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(225px, 1fr)); gap: 14px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px; background: var(--paper); min-width: 0; }
.card.playing { border-color: var(--accent); box-shadow: 0 0 0 2px #1f5fbf33; }
.card.truth { background: #f4faf7; }
.card-head { display: flex; justify-content: space-between; align-items: baseline; gap: 8px; margin-bottom: 6px; }
.card-head b { overflow-wrap: anywhere; }
kbd { font: 11px ui-monospace, monospace; color: var(--soft); border: 1px solid var(--line); border-radius: 4px;
  padding: 0 5px; }
video { width: 100%; max-height: 340px; display: block; border-radius: 6px; background: #000; }
.broken { color: #b93420; font-size: 12px; }
.timeline { position: relative; margin-top: 8px; cursor: crosshair; }
.timeline img { width: 100%; height: 96px; display: block; background: #000004; }
.lane { position: relative; height: 13px; background: #eef1f4; border-bottom: 1px solid #fff; overflow: hidden; }
.lane .mark { position: absolute; top: 1px; bottom: 1px; min-width: 11px; border-radius: 2px; font-size: 9px;
  line-height: 11px; color: #fff; padding-left: 2px; overflow: hidden; white-space: nowrap; }
.lane .tick { position: absolute; top: 0; bottom: 0; width: 3px; margin-left: -1px; background: #10241c; }
.lane .tick.false { background: var(--false); }
.hit { background: var(--hit); }
.missed { background: var(--missed); }
.false { background: var(--false); }
.right-time { background: repeating-linear-gradient(45deg, #17a673 0 3px, #9fdcc4 3px 6px); }
.lane .mark.right-time { color: #0c4a34; }
.onset { position: absolute; top: 0; bottom: 0; width: 1px; background: #ffffff59; pointer-events: none; }
.playhead { position: absolute; top: 0; bottom: 0; width: 2px; background: #ffd23f; pointer-events: none; left: 0;
  opacity: 0; }
.card.playing .playhead, .card.touched .playhead { opacity: 1; }
.numbers { display: grid; grid-template-columns: repeat(3, auto); justify-content: space-between; gap: 0 10px;
  margin-top: 6px; font-size: 13px; font-variant-numeric: tabular-nums; }
.numbers .soft { margin-right: 4px; }
.numbers .wide { grid-column: 1 / -1; }
.refused { color: #b93420; font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 16px; height: 10px; border-radius: 2px; margin-right: 5px; }
dl.lineage { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; font-size: 13px; }
dl.lineage dt { color: var(--soft); }
dl.lineage dd { margin: 0; font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
"""

SCRIPT = """
'use strict';
const cards = [...document.querySelectorAll('.card')];
const videos = cards.map(card => card.querySelector('video'));
let ready = 0, broken = 0, turn = null;
function count() { document.body.dataset.ready = ready; document.body.dataset.broken = broken; }
count();
function stopOthers(one) { for (const v of videos) if (v !== one && !v.paused) v.pause(); }
function follow(card, video) {
  const head = card.querySelector('.playhead');
  const draw = () => {
    head.style.left = 100 * video.currentTime / Number(card.dataset.duration) + '%';
    if (!video.paused) requestAnimationFrame(draw);
  };
  draw();
}
function start(video) { video.currentTime = 0; video.play(); }
cards.forEach((card, i) => {
  const video = videos[i];
  const isReady = () => { ready += 1; count(); };
  if (video.readyState >= 1) isReady(); else video.addEventListener('loadedmetadata', isReady);
  video.addEventListener('error', () => {
    broken += 1; count();
    card.querySelector('.broken').textContent = 'This browser cannot play H.264 with AAC.';
  });
  video.addEventListener('play', () => { stopOthers(video); card.classList.add('playing'); follow(card, video); });
  video.addEventListener('pause', () => card.classList.remove('playing'));
  video.addEventListener('seeked', () => { card.classList.add('touched'); follow(card, video); });
  video.addEventListener('ended', () => {
    if (!turn || turn.clip !== card.closest('.clip')) return;
    const next = turn.left.shift();
    if (next) setTimeout(() => start(next), 300); else turn = null;
  });
  const timeline = card.querySelector('.timeline');
  timeline.addEventListener('click', event => {
    const box = timeline.getBoundingClientRect();
    turn = null;
    video.currentTime = Number(card.dataset.duration) * (event.clientX - box.left) / box.width;
    video.play();
  });
});
document.querySelectorAll('.in-turn').forEach(button => button.addEventListener('click', () => {
  const clip = button.closest('.clip');
  const left = [...clip.querySelectorAll('video')];
  turn = { clip, left };
  start(left.shift());
}));
const sections = [...document.querySelectorAll('.clip')];
const links = [...document.querySelectorAll('nav a')];
function current() {
  let best = 0;
  sections.forEach((s, i) => { if (s.getBoundingClientRect().top < innerHeight / 2) best = i; });
  return best;
}
function markHere() {
  const here = current();
  links.forEach((a, i) => a.classList.toggle('here', i === here && scrollY > 200));
}
addEventListener('scroll', markHere, { passive: true });
addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !sections.length) return;
  if (/^[1-9]$/.test(event.key)) {
    const video = sections[current()].querySelectorAll('video')[Number(event.key) - 1];
    if (video) { turn = null; start(video); }
  } else if (event.key === 'n' || event.key === 'p') {
    const to = sections[Math.min(sections.length - 1, Math.max(0, current() + (event.key === 'n' ? 1 : -1)))];
    to.scrollIntoView();
  }
});
"""
