"""Writes the short tales that the tiny example model is trained on.

The sentences were written for this project and have its licence (proverbs and riddles are traditional), so the text,
the tokenizer and the weights made from it can be redistributed. A tale is a walk through the functions of the folk
tale (V. Propp, "Morphology of the Folktale", 1928): an opening, something that is lacking, a departure, a helper,
trials, the return. Seven million parameters learn such prose in minutes, and a novel's only in hours.

`[a|b]` picks one alternative, `{name}` is filled from the tale's cast; both nest. The same seed gives the same text.

    python examples/text/write_stories.py --tales 2500 --seed 1 --out examples/text/stories.txt.xz
"""

import argparse
import lzma
import random
import re
from collections.abc import Sequence
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"

GIRLS = [
    "Anna",
    "Clara",
    "Elsa",
    "Greta",
    "Ida",
    "Lena",
    "Mara",
    "Nell",
    "Rosa",
    "Tilda",
    "Vera",
    "Wren",
    "Hazel",
    "Ivy",
    "Maud",
    "Sofie",
]
BOYS = [
    "Anton",
    "Bruno",
    "Edgar",
    "Felix",
    "Hans",
    "Jonas",
    "Karl",
    "Luke",
    "Niels",
    "Otto",
    "Peter",
    "Robin",
    "Theo",
    "Viktor",
    "Emil",
    "Tom",
]
TRADES = {
    "baker": ("bread", "oven"),
    "weaver": ("cloth", "loom"),
    "miller": ("flour", "mill"),
    "smith": ("iron", "forge"),
    "potter": ("clay", "wheel"),
    "fisherman": ("fish", "boat"),
    "shepherd": ("wool", "flock"),
    "gardener": ("roses", "garden"),
    "clockmaker": ("clocks", "workshop"),
    "shoemaker": ("shoes", "bench"),
    "woodcutter": ("wood", "axe"),
    "beekeeper": ("honey", "hives"),
}
SMALL = [
    "mouse",
    "sparrow",
    "hedgehog",
    "squirrel",
    "rabbit",
    "frog",
    "robin",
    "beetle",
    "snail",
    "duckling",
    "kitten",
    "lamb",
    "wren",
    "mole",
    "cricket",
]
LARGE = ["bear", "wolf", "lion", "ox", "stag", "boar", "eagle", "bull", "tiger"]
SLY = ["fox", "crow", "cat", "raven", "weasel", "magpie", "jackdaw"]
FRIENDS = [
    "goose",
    "goat",
    "donkey",
    "hen",
    "dog",
    "heron",
    "badger",
    "otter",
    "hare",
    "owl",
    "toad",
    "swan",
    "pony",
    "stork",
]
PLACES = [
    "village at the foot of a mountain",
    "cottage at the edge of a deep forest",
    "town beside a wide river",
    "house on a green hill",
    "mill by a quiet stream",
    "village by the grey sea",
    "farmhouse in a narrow valley",
    "castle with seven towers",
    "hut among the old pine trees",
    "town with a high stone wall",
    "house at the end of a long road",
    "village between two lakes",
]
WOODS = [
    "the dark forest",
    "the old oak wood",
    "the misty valley",
    "the high moor",
    "the frozen hills",
    "the great marsh",
    "the silent mountain",
    "the birch wood",
    "the land beyond the river",
    "the stony desert",
    "the deep ravine",
]
GIFTS = {
    "a silver whistle": "blew the silver whistle, and at once [a hundred birds came down from the sky|the "
    "wind rose and carried all before it|every lock in the place sprang open]",
    "a ball of red thread": "threw down the ball of red thread, and it rolled on and on and [showed the way|led "
    "through every turning|stopped just where it was needed]",
    "a small lamp": "lit the small lamp, and its light was so [clear|strong|bright] that [nothing could "
    "hide from it|the darkness drew back like a curtain|even the stones began to shine]",
    "an old wooden spoon": "stirred the air with the old wooden spoon, and there stood [a table covered with "
    "good food|a pot of hot soup that never grew empty|bread and cheese enough for forty "
    "men]",
    "a golden key": "turned the golden key in the [lock|door], and it opened [without a sound|as if it "
    "had been waiting|with a soft click]",
    "a feather from a white bird": "held up the white feather, and [it grew as light as air on both sides of the wall|"
    "a white bird came and carried the load|a cool wind lifted the gate from its place]",
    "a little bell": "rang the little bell, and [everyone who heard it fell asleep|the water stood still|"
    "the stones moved aside]",
    "three brown nuts": "cracked the first of the three brown nuts, and out came [a cloak as blue as the sky|"
    "a horse no bigger than a cat, which grew and grew|a bridge that reached from bank "
    "to bank]",
    "a pair of worn shoes": "put on the worn shoes, and with [one step|three steps|a single jump] [crossed the "
    "whole valley|stood on the other side|was over the wall and away]",
    "a blue cloak": "put on the blue cloak, and [no eye could see who wore it|not even the dogs noticed "
    "anything|walked past the guards like a breath of wind]",
}
WANTED = {
    "the water of life": (
        "to heal the old king",
        "drank the water and rose from [his|the] bed",
        "the old king",
    ),
    "the singing bird": ("to comfort the sad princess", "heard the bird and smiled again", "the princess"),
    "the golden apple": ("to please the queen", "ate the apple and grew young and strong", "the queen"),
    "the herb that grows under the snow": (
        "to cure a sick mother",
        "tasted the herb and was well again",
        "the mother",
    ),
    "the lost ring": ("to keep the promise of a father", "saw the ring and wept for joy", "the father"),
    "the fire that never goes out": (
        "to warm the cold village",
        "gathered round the fire and danced",
        "the people",
    ),
    "the silver horse": (
        "to win a wager with the duke",
        "looked at the horse and could not say a word",
        "the duke",
    ),
    "the book with no end": (
        "to teach the children",
        "opened the book and read until the evening",
        "the children",
    ),
    "the seed of summer": (
        "to wake the sleeping garden",
        "planted the seed and watched the flowers come",
        "the people",
    ),
}
GUARDS = {
    "a giant": "he",
    "a dragon with green eyes": "it",
    "a witch": "she",
    "a proud knight": "he",
    "an old troll": "he",
    "a great black dog": "it",
    "a king of the robbers": "he",
    "a queen of ice": "she",
}

WEATHER = (
    "[The sun was shining|Snow lay on the roofs|A soft rain was falling|The wind sang in "
    "the trees|The stars were bright|A white mist covered the fields|The first leaves "
    "were falling|The evening was warm and still|The moon stood high in the sky|The "
    "morning was cold and clear]"
)
OPENINGS = [
    "Once upon a time there [was|lived] {a_hero} who lived in a {place}. ",
    "Once upon a time, in a {place}, there lived {a_hero}. ",
    "Once upon a time {a_hero} lived in a {place}. ",
    "Long ago there was {a_hero} who lived in a {place}. ",
    "There was once {a_hero} who had [a small house|not a penny in the world|a good "
    "heart and an empty purse] in a {place}. ",
    "Many years ago, in a {place}, there was {a_hero}. ",
    "In a {place} there once lived {a_hero}. ",
]
CHARACTER = [
    "{He} was [kind to everyone|never in a hurry|always ready to help|known for {his} "
    "clear voice|small, but {he} was not afraid of anything] and [worked from morning "
    "till night|sang while {he} worked|shared {his} bread with the birds|told the truth "
    "even when it was hard|never forgot a friend]. ",
    "{He} had [no brothers and no sisters|seven brothers and one sister|only an old "
    "grandmother|a father who was often away|nothing but {his} good sense], [but {he} "
    "was happy|and so {he} learned to look after {himself}|and the days were long|and "
    "yet {he} did not complain]. ",
    "Everybody [loved|knew|laughed at] {him} because {he} [talked to the animals|asked "
    "so many questions|could not tell a lie|believed every story|gave away whatever {he} "
    "had]. ",
    "{weather}, and {he} [sat by the window and dreamed|was out in the fields as usual|"
    "was on {his} way home|swept the floor and hummed a song]. ",
]
TRADE_LINES = [
    "{He} was {a_trade} and made the best {goods} in the whole country. ",
    "{His} father had been {a_trade}, and {he} too worked with {goods} all day long. ",
    "{He} lived by selling {goods}, and the {tool} was never idle. ",
]
LACK = [
    "One day news came that {wanted} was needed {purpose}, and that whoever brought it "
    "should have [half the kingdom|a bag of gold|the finest horse in the stable|whatever "
    "{he_or} wished]. ",
    "Now it happened that nobody could rest until someone found {wanted} {purpose}. Many "
    "had gone out to look for it, and none had come back. ",
    'In that year there was great trouble in the land, and an old woman said, "Only '
    '{wanted} can help us." So someone had to go and fetch it {purpose}. ',
    "One night {name} dreamed of {wanted}. In the morning {he} knew that {he} must go and find it {purpose}. ",
]
FAREWELL = [
    '"I will go," said {name}. [Everyone laughed|{His} grandmother wept|Nobody believed '
    "{him}|The neighbours shook their heads], but {he} [put a piece of bread in {his} "
    "pocket|took {his} coat and {his} stick|tied {his} shoes] and [set out|went on {his} "
    "way|walked out of the door]. ",
    '"Do not go," said {his} mother. "The road is long, and [winter is near|the nights '
    'are dark|nobody knows where it ends]." "I must," said {name}, "but I will come '
    'back." And {he} kissed her and [went|set out the same day]. ',
    "So {name} said goodbye to {his} friends, [looked back once|did not look back|took "
    "one last look at the house], and walked towards {wood}. ",
]
TRAVEL = [
    "{He} walked [all day|for three days|day and night|until {his} shoes were full of "
    "holes], and at last {he} came to {wood}. ",
    "The road went up and down, over [hills|bridges] and through [fields|villages], until it ended at {wood}. ",
    "The sun rose and the sun set, and still {he} went on. On the third day {he} saw {wood} before {him}. ",
    "{weather} when {he} came to {wood}. There was no living soul to be seen far and wide. ",
]
DONOR = [
    "There {he} met {a_donor} [with one foot caught in a trap|that was weak with hunger|"
    'that had fallen into the water|sitting under a thorn bush and crying]. "[Please '
    'help me|Have pity on me|Do not pass me by]," said the {donor}. {name} [stopped at '
    "once|did not think twice|knelt down], and [gave it half of {his} bread|set it free|"
    "carried it to a dry place|bound its foot with a piece of cloth]. ",
    'Under a tree sat {a_donor}. "Where are you going?" asked the {donor}. "I am looking '
    'for {wanted}," said {name}. "Then sit down and [share your bread with me|tell me a '
    'story|comb my hair|warm my cold feet]," said the {donor}, and {name} did so [gladly|'
    "with a smile|without a word of complaint]. ",
    "In the middle of the path lay {a_donor}, and it could not move. Others had gone by "
    "and [laughed|looked away], but {name} [lifted it gently|brought it water in {his} "
    "hat|sat with it through the night] until it was [well|strong] again. ",
]
GIFT = [
    '"You have a good heart," said the {donor}. "Take {gift}. [When you are in need, use '
    "it, and do not be afraid|It looks like nothing, but it is worth more than gold|Keep "
    'it well, for it will help you once and only once]." {name} thanked the {donor} and '
    "went on. ",
    'Then the {donor} gave {him} {gift} and said, "[One good turn deserves another|'
    "Kindness is never lost|I have nothing else to give you]. [Use it when all else "
    'fails|Remember me when the night is darkest]." ',
    'For this the {donor} gave {him} {gift}. "You will know when to use it," said the {donor}, and was gone. ',
]
TRIALS = [
    "Soon {he} came to a river [without a bridge|as wide as a lake|with black water]. "
    "{He} [looked for a boat, but there was none|waited, and thought, and waited]. At "
    "last {he} [found a fallen tree and crept across|saw the stones under the water and "
    "jumped from one to the next|asked an old heron, who showed {him} the shallow "
    "place]. ",
    "That night {he} slept [in a hollow tree|under a hedge|in an empty barn], and [an "
    "owl kept watch over {him}|the rain ran down all round {him}|{he} dreamed of home]. "
    "In the morning {he} [washed {his} face in the dew|ate the last of {his} bread|heard "
    "a cock crow far away] and went on. ",
    "Then {he} came to a place where three roads met. The first was [broad and easy|"
    "paved with marble], the second was [full of flowers|green and soft], and the third "
    'was [narrow and full of thorns|steep and stony]. "[What is easy is seldom right|The '
    'hard road is the honest one]," thought {name}, and {he} took the third. ',
    'On the way a [rich man|merchant|stranger with a red beard] called to {him}, "Give '
    'up and [come with me|work for me]. I will give you [gold|fine clothes|a warm bed]." '
    'But {name} answered, "[I have given my word|Someone is waiting for me|Gold is cold '
    'at night]," and [walked past|did not stop]. ',
    'A {small} sat by the road and [sang|laughed|cried]. "[Go on, {name}," said the '
    '{small}, "you are nearly there|Turn back, {name}," said the {small}, "the night is '
    'coming|Have patience, {name}," said the {small}, "the way is long]." {name} '
    "[thanked it|gave it a few crumbs|smiled] and walked on. ",
]
GUARD = [
    "At the end of the road stood [a house of stone|a tower without windows|a gate of "
    'iron|a cave in the rock], and there {wanted} was kept by {guard}. "Who dares to '
    'come here?" cried {the_guard}. "I am {name}," {he} said, "and I have come for '
    '{wanted}." ',
    "There at last was {wanted}. But {guard} [lay before the door|sat beside it|guarded "
    "it day and night] and [never slept|roared so that the trees shook|looked at {him} "
    'with cold eyes]. "[Nobody leaves this place|What will you give me for it|Go home, '
    'little one]," said {the_guard}. ',
]
RIDDLES = [
    '"Answer me this," said {the_guard}. "[What has no feet and yet runs?" "The river|'
    'What grows larger the more you take away?" "A hole|What is lighter than a feather, '
    'and yet no giant can hold it long?" "My breath|What goes round the house and leaves '
    'only one track?" "The moon on the snow|What has a mouth and never eats?" "The river|'
    'What belongs to me, though others use it more?" "Your name|What dies when it '
    'drinks?" "The fire]," said {name}. {The_guard} [turned pale|stamped on the ground|'
    "was silent for a long time]. ",
    "{The_guard} [laughed so loudly that stones fell from the roof|came nearer and "
    "nearer|opened a mouth as wide as a barn door]. {name} [trembled|was afraid], but "
    "{he} [did not run away|stood still|thought of home]. ",
]
USE = [
    "Then {he} remembered the {donor}. {He} {use}. {The_guard} [could do nothing|stood "
    "still with wonder|ran away and was never seen again|fell down and slept], and "
    "{name} took {wanted} and [hurried|ran|walked] away. ",
    '"Now or never," thought {name}. {He} {use}. When {the_guard} saw it, {guard_he} '
    "[let {him} pass|began to weep|bowed low], and {name} went in and took {wanted}. ",
]
RETURN = [
    "The way home was [short|half as long], as it always is, and when {he} came to the "
    "{home} [all the bells were ringing|the lamps were lit in every window|the children "
    "ran to meet {him}]. {Patient} {cure}. ",
    "So {name} came home [before the first snow|when the cherry trees were in bloom|on "
    "the evening of the seventh day]. {Patient} {cure}. ",
]
REWARD = [
    "There was a feast that lasted [three days|a whole week|till the morning], and "
    "{name} sat [at the head of the table|next to {his} grandmother|among {his} "
    "friends]. ",
    '"What shall I give you?" they asked {him}. "[A new roof for my house|A bag of seed '
    'for the spring|Nothing but a good supper|A chair for my old grandmother]," said '
    "{name}, and {he} got [that and more|it on the same day]. ",
    "As for {gift_the}, it [lay on the shelf above the fire|was never used again|hung on "
    "the wall for many years], and when strangers asked about it, {name} [only smiled|"
    "told this story]. ",
]
ENDINGS = [
    "And [they lived|{name} lived] happily [ever after|to the end of {his_their} days|for many years].",
    "And if [they have|{name} has] not died, [they are|{he} is] living there still.",
    "That is the end of the story, and [whoever does not believe it must pay a penny|the "
    "one who told it to me is still warm from telling it|now it is time to sleep].",
    "From that day on nobody in the {home} [went hungry|laughed at {him}|was afraid of the dark] any more.",
]
ONE_DAY = "[One day|One morning|One evening|One summer day|One winter night|Late in the autumn|Early one morning]"


class Cast(dict):
    """The names and pronouns of one tale; pronouns of the hero come capitalised too."""

    def person(self, random_: random.Random) -> None:
        """Chooses a girl or a boy as the hero."""
        girl = random_.random() < 0.5
        self["name"] = random_.choice(GIRLS if girl else BOYS)
        pronouns = ("she", "her", "her", "herself") if girl else ("he", "him", "his", "himself")
        for key, word in zip(("he", "him", "his", "himself"), pronouns):
            self[key], self[key.capitalize()] = word, word.capitalize()
        self["kind"] = random_.choice(["girl", "young woman", "maid"] if girl else ["boy", "young man", "lad"])
        self["his_their"] = random_.choice([self["his"], "their"])
        adjective = random_.choice(
            ["poor", "clever", "brave", "little", "young", "quiet", "cheerful", "honest", "gentle", "lonely"]
        )
        self["a_hero"] = f"a {adjective} {self['kind']} [named|called|by the name of] {self['name']}"


def expand(template: str, cast: Cast, random_: random.Random) -> str:
    """Picks alternatives from the inside out and fills the names until nothing is left to replace."""
    while True:
        chosen = re.sub(r"\[([^\[\]]*)\]", lambda match: random_.choice(match[1].split("|")), template)
        chosen = re.sub(r"\{(\w+)\}", lambda match: cast[match[1]], chosen)
        if chosen == template:
            return chosen
        template = chosen


def tidy(text: str) -> str:
    """Sentence capitals, `an` before a vowel, single spaces."""
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)
    return re.sub(r'(^|\n|[.!?] "?|\n")([a-z])', lambda match: match[1] + match[2].upper(), text)


def quest(cast: Cast, random_: random.Random) -> list[Sequence[str]]:
    """Someone goes out to fetch what is lacking."""
    wanted = random_.choice(list(WANTED))
    purpose, cure, patient = WANTED[wanted]
    gift = random_.choice(list(GIFTS))
    guard = random_.choice(list(GUARDS))
    bare_guard = re.sub(r"^an? ", "", guard).split(" with ")[0]
    donor = random_.choice(
        [*FRIENDS, *SMALL, "little old man", "beggar woman", "grey dwarf", "old soldier", "blind fiddler"]
    )
    cast.update(wanted=wanted, purpose=purpose, cure=cure, Patient=patient.capitalize(), gift=gift, use=GIFTS[gift])
    cast.update(gift_the="the " + re.sub(r"^(an?|three) ", "", gift) if "three" not in gift else "the last two nuts")
    cast.update(guard=guard, the_guard="the " + bare_guard, The_guard="The " + bare_guard, guard_he=GUARDS[guard])
    cast.update(donor=donor, a_donor="a " + donor)
    trials = random_.sample(TRIALS, random_.randint(1, 3))
    donor_first = [*DONOR[1:2]] if " " in donor else DONOR
    first = [OPENINGS, CHARACTER, TRADE_LINES] if random_.random() < 0.5 else [OPENINGS, CHARACTER]
    paragraphs = [first, [LACK, FAREWELL], [TRAVEL, donor_first, GIFT], [[trial] for trial in trials]]
    paragraphs += [[GUARD, RIDDLES, USE], [RETURN, REWARD, ENDINGS]]
    return paragraphs


def fable(cast: Cast, random_: random.Random) -> list[Sequence[str]]:
    """Two animals meet, and one learns something."""
    plot = random_.choice(["repaid", "trick", "race", "winter", "quarrel"])
    cast.update(large=random_.choice(LARGE), sly=random_.choice(SLY))
    one, two = random_.sample([*SMALL, *FRIENDS], 2)
    cast.update(one=one, two=two)
    plots = {
        "repaid": [
            [
                [
                    "[Once upon a time|Long ago|One hot day] a {large} [lay asleep in the shade|was "
                    "resting under an oak|slept in the tall grass], and a {one} [ran over its nose|fell "
                    "from a branch onto its back|came too near]. ",
                ],
                [
                    "The {large} woke and [put a heavy foot on it|caught it|looked down at it with "
                    'burning eyes]. "How dare you wake me?" [roared|cried|growled] the {large}. "[Let me '
                    'go|Spare me|Be kind to me]," begged the {one}, "and [one day I will help you|I will '
                    'never forget it|I will pay you back]." ',
                ],
                [
                    "The {large} laughed [to think that anything so small could help it|until the leaves "
                    "shook], but it let the {one} go. ",
                ],
            ],
            [
                [
                    "Not long after, the {large} was caught [in a net|in a trap that the hunters had set|"
                    "between two rocks] and [could not move|cried for help]. The {one} heard it and "
                    "[came running|came as fast as it could]. ",
                ],
                [
                    "[All night long it worked|It bit and pulled and scratched|It called all its "
                    "brothers and sisters], and [before the sun rose|at last|little by little] the "
                    "{large} was free. ",
                ],
                [
                    '"You laughed at me," said the {one}, "but now you see that [even the small can help '
                    'the great|nobody is too small to be a friend]." From that day on they were [the '
                    "best of friends|never seen apart]. ",
                ],
            ],
        ],
        "trick": [
            [
                [
                    "[Once upon a time|One cold morning|In the days when animals could speak] a {large} "
                    '[met|caught] a {one} at the edge of {wood}. "I am hungry," said the {large}, "and I '
                    'am going to eat you." ',
                ],
                [
                    "The {one} [trembled|was very much afraid], but it [thought quickly|did not show "
                    'it]. "[What a pity|As you like]," said the {one}. "[I am so thin today|My cousin is '
                    "far fatter|You will get only one bite out of me]. [Wait until the autumn, when I "
                    "shall be fat|Come with me and I will show you a whole cheese|First let me sing you "
                    'my last song]." ',
                ],
            ],
            [
                [
                    "The {large} was [greedy|vain|rather stupid] and [agreed|said yes]. [So they went "
                    "together to the well, and there in the water lay the moon, round and yellow like a "
                    "cheese. The {large} jumped in after it and came out wet and cold|The {one} sang so "
                    "loudly that the shepherds heard it and came with sticks, and the {large} ran for "
                    "its life|When the autumn came the {one} was safe under the ground, and the {large} "
                    "waited at the wrong hole until the snow fell]. ",
                ],
                [
                    'The {one} sat [on a high branch|behind a stone|in its warm hole] and laughed. "[Big '
                    'teeth are not everything|A clever head is better than a strong arm]," it said. ',
                ],
            ],
        ],
        "race": [
            [
                [
                    "[Once upon a time|Long ago|One spring] a {one} boasted that nobody in the whole "
                    "wood could [run|swim|climb|build] as well as it could. The {sly} grew tired of "
                    'hearing it and said, "Then [race with the {two}|show us, and let the {two} try '
                    'too]." ',
                ],
                [
                    "Everyone laughed, because the {two} was [slow|old|very quiet]. But the {two} only "
                    'said, "I will do what I can." ',
                ],
            ],
            [
                [
                    "When the {sly} gave the sign, the {one} [was far ahead in a moment|started with a "
                    'great jump]. "There is plenty of time," it thought, and [lay down to sleep|stopped '
                    "to eat berries|began to talk with the birds]. The {two} [went on step by step|did "
                    "not stop once|looked neither left nor right]. ",
                ],
                [
                    "[When the {one} woke|At sunset|When the {one} looked up], the {two} had already "
                    "[finished|reached the old oak|won]. The {one} [hung its head|was so ashamed that it "
                    "hid for a week|never boasted again]. ",
                ],
            ],
        ],
        "winter": [
            [
                [
                    "[Once upon a time|One year|Long ago] a {one} and a {two} lived [under the same tree|"
                    "side by side|in the same hedge]. All summer the {one} [gathered seeds|carried home "
                    "grain|worked in the sun], and the {two} [sang and danced|slept in the grass|laughed "
                    "at it]. ",
                ],
                [
                    '"Come and play," said the {two}. "[Winter is far away|The sun is shining]." "[The '
                    'snow will come|I have no time]," said the {one}, and went on working. ',
                ],
            ],
            [
                [
                    "Then {weather_low}, and the first snow fell. The {two} [found nothing to eat|was "
                    'cold and hungry] and knocked at the door of the {one}. "[Let me in|Give me a few '
                    'seeds]," it begged. ',
                ],
                [
                    '["What did you do all summer?" asked the {one}. "I sang," said the {two}. "Then '
                    'sing for me now," said the {one}, "and you shall have your supper." So they sat by '
                    "the fire, and one of them sang and the other listened|The {one} was angry for a "
                    'moment. Then it opened the door. "Come in," it said, "but next summer you shall '
                    'help me." And the {two} kept its word|The {one} gave it half of everything it had, '
                    "for it could not eat in peace while another went hungry]. ",
                ],
            ],
        ],
        "quarrel": [
            [
                [
                    "[Once upon a time|In the time of the great frost|One day] a {one} and a {two} found "
                    "[a piece of cheese|a red apple|a warm nest|an old boot full of corn] and could not "
                    'agree how to share it. "I saw it first," said the {one}. "I took it first," said '
                    "the {two}. ",
                ],
                [
                    "They quarrelled [all morning|until they were both hoarse|so loudly that the {sly} heard them]. ",
                ],
            ],
            [
                [
                    'Then came the {sly}. "Let me be the judge," it said. It [bit off a piece on this '
                    "side and a piece on that side|weighed it and tasted it and weighed it again], to "
                    "make both halves equal, until [nothing was left|it had eaten everything]. ",
                ],
                [
                    'The {one} looked at the {two}, and the {two} looked at the {one}. "[We have been '
                    'fools|Next time we will share|Half would have been better than nothing]," they '
                    "said, and they [went home together|laughed at last|never quarrelled again]. ",
                ],
            ],
        ],
    }
    paragraphs = plots[plot]
    cast["weather_low"] = "{weather}"
    moral = {
        "repaid": "[Little friends may prove great friends|No kindness is ever lost]",
        "trick": "[A clever head is better than a strong arm|Greed makes even the strong blind]",
        "race": "[Slow and steady wins the race|Pride comes before a fall]",
        "winter": "[He who does not work in summer must beg in winter|Two who share are warmer than one who keeps]",
        "quarrel": "[When two quarrel, a third one wins|Half a loaf is better than none]",
    }[plot]
    return [*paragraphs, [[moral + "."]]] if random_.random() < 0.7 else paragraphs


def lost(cast: Cast, random_: random.Random) -> list[Sequence[str]]:
    """A child loses the way and finds it again."""
    cast.update(friend=random_.choice(FRIENDS), small2=random_.choice(SMALL))
    return [
        [OPENINGS, CHARACTER],
        [
            [
                ONE_DAY + " {he} went [to gather berries|to look for mushrooms|to bring dinner to {his} father|"
                'to find the lost lamb] in {wood}. "Stay on the path," said {his} mother, "and come '
                'home before [dark|the sun goes down]." ',
            ],
            [
                "But {he} saw [a blue butterfly|a white deer|a light between the trees|flowers more "
                "beautiful than any at home] and followed it, [a little to the left|deeper and "
                "deeper|always one step further], and when {he} looked round the path was gone. ",
            ],
        ],
        [
            [
                "{weather}. {name} called, but [nobody answered|only the echo answered]. {He} sat "
                "down on a stone and [began to cry|did not know what to do|tried to be brave]. ",
            ],
            [
                'Then a {friend} came [out of the bushes|along the stream|down from the rocks]. "Why '
                'are you [sad|crying|so quiet]?" asked the {friend}. "I have lost my way," said '
                '{name}. "[Then we will look for it together|I know every stone here|Dry your eyes '
                'and follow me]," said the {friend}. ',
            ],
            [
                "They walked [past the old mill|over the stepping stones|round the black pond] and "
                "[through a gap in the hedge|under the roots of a great tree|up a small hill], and "
                "there they met a {small2}, who [told them which way the smoke was blowing|had seen "
                "a lamp in a window|gave them nuts to eat]. ",
            ],
        ],
        [
            [
                "At last {he} saw [the light of {his} own window|the roof of {his} house|{his} "
                "mother with a lantern]. {He} turned to thank the {friend}, but [it was already gone|"
                "it only nodded and went back into the wood]. ",
            ],
            [
                '"Where have you been?" cried {his} mother, and [held {him} tight|gave {him} hot '
                "soup|put {him} to bed]. {name} told her everything. Since then {he} has put [a bowl "
                "of milk|a piece of bread|a handful of corn] outside the door every evening, and "
                "every morning it is empty. ",
            ],
            ENDINGS[2:3] if random_.random() < 0.3 else [""],
        ],
    ]


def maker(cast: Cast, random_: random.Random) -> list[Sequence[str]]:
    """A poor craftsman's kindness is repaid."""
    cast["visitor"] = random_.choice(
        [
            "an old man in a grey coat",
            "a woman with a basket",
            "a child without shoes",
            "a soldier on his way home",
            "a small man with a long beard",
        ]
    )
    cast["the_visitor"] = re.sub(r"^an? ", "", cast["visitor"]).split(" with")[0].split(" in a")[0].split(" on ")[0]
    return [
        [OPENINGS, TRADE_LINES],
        [
            [
                "But times were hard, and [nobody bought anything any more|the {tool} was old|there "
                "was little left in the house]. [At last there was only one loaf in the house|At "
                "last {he} had only three pennies|The winter was long and the wood was wet]. ",
            ],
            CHARACTER,
        ],
        [
            [
                ONE_DAY + ' {visitor} knocked at the door. "[May I warm myself at your fire|Have you something '
                'to eat|May I sleep here tonight]?" asked the {the_visitor}. "[It is not much, but '
                'you are welcome|Half of what I have is yours|Come in and sit down]," said {name}. ',
            ],
            [
                "They [ate together|sat by the fire|talked until late], and {name} slept on the "
                "floor so that the guest could have the bed. In the morning the {the_visitor} said, "
                '"[What you begin today you shall not finish until evening|Look into your {tool} '
                'when I am gone|Your {goods} shall never fail you again]." ',
            ],
        ],
        [
            [
                "{name} [laughed|did not understand it] and went to work. But [the more {he} took, "
                "the more there was|whatever {he} made was twice as fine as before|by noon the whole "
                "house was full of {goods}], and people came from [far and near|every village] to "
                "buy it. ",
            ],
            [
                "[A rich neighbour|The greedy innkeeper|A proud merchant] heard of it and [invited "
                'the stranger too|ran after the stranger]. "Give me the same!" he cried. "[Very well|'
                'As you wish]," said the {the_visitor}. The man went home and [began to count his '
                "money, and he could not stop until all of it was gone|sneezed, and he sneezed until "
                "the evening|picked up a bucket of water, and he had to carry water till the sun "
                "went down]. ",
            ],
        ],
        [
            [
                "{name} never saw the stranger again, but {he} always kept [an empty chair at the "
                "table|a candle in the window|a warm bed ready]. ",
            ],
            ENDINGS,
        ],
    ]


def siblings(cast: Cast, random_: random.Random) -> list[Sequence[str]]:
    """Two proud ones fail where the youngest succeeds."""
    ruler = random_.choice(["king", "queen", "duke", "old farmer", "rich widow"])
    cast.update(
        ruler=ruler,
        friend=random_.choice(FRIENDS),
        task=random_.choice(
            [
                "keep awake for three nights",
                "bring back the white cow from the moor",
                "count the stars above the tower",
                "make the silent bell ring",
                "carry water in a basket of straw",
                "find the end of the long road",
                "catch the wind in a sack",
                "light the lamp on the top of the mountain",
            ]
        ),
    )
    cast["child"] = "daughter" if cast["she_or_he"] == "she" else "son"
    return [
        [
            [
                "[Once upon a time|Long ago] there was {a_old} who had three {child}s. The eldest "
                "was [proud|strong], the second was [lazy|rich], and the youngest, whose name was "
                "{name}, was [thought to be simple|small and quiet|laughed at by everyone]. ",
            ],
            CHARACTER[:3],
        ],
        [
            [
                ONE_DAY + " the {ruler} of that country let it be known that whoever could {task} should [have "
                "a chest full of silver|live in the castle|be richly rewarded]. ",
            ],
            [
                "The eldest went first. On the way a {friend} asked for [a bit of bread|a drink of "
                "water], but the eldest [chased it away|had no time]. When night came [the eldest "
                "fell asleep|the wind blew out the lantern|nothing would go right], and so the "
                "eldest came home with [empty hands|wet feet]. ",
            ],
            [
                "Then the second went and [did no better|fared just the same], for the second too "
                "[laughed at the {friend}|kept everything and gave nothing]. ",
            ],
        ],
        [
            [
                '"Now let me try," said {name}. "You?" cried the others. "[You cannot even tie your '
                'shoes!|What can you do that we cannot?]" But {name} went all the same. ',
            ],
            [
                "{He} too met the {friend}, and {he} [shared everything {he} had|gave it {his} last "
                'crust|let it drink from {his} cup]. "Now listen," said the {friend}. "If you want '
                "to {task}, you must [wait until the moon rises|be patient and not speak a word|put "
                "your ear to the ground and do as the old trees tell you|take this pebble and hold "
                'it tight in your hand]." ',
            ],
            [
                "{name} did [just as it said|exactly that]. It was [hard|cold|strange], and [more "
                "than once|three times] {he} almost gave up, but [in the morning|at the end] it was "
                "done. ",
            ],
        ],
        [
            [
                'The {ruler} [could hardly believe it|rubbed both eyes|was full of wonder]. "How did '
                'you do it?" the {ruler} asked. "[A friend helped me|I listened|I was not alone]," '
                "said {name}. ",
            ],
            [
                "{name} got what had been promised, and because {he} bore no grudge {he} [shared it "
                "with the other two|asked the other two to come and live with {him}]. ",
            ],
            ENDINGS[:3],
        ],
    ]


PLOTS = [quest, quest, quest, fable, fable, lost, maker, siblings]


def tale(random_: random.Random) -> str:
    """One tale: paragraphs separated by a single newline."""
    cast = Cast()
    cast.person(random_)
    trade = random_.choice(list(TRADES))
    place = random_.choice(PLACES)
    cast.update(place=place, home=place.split()[0], wood=random_.choice(WOODS), weather=WEATHER)
    cast.update(a_trade="a " + trade, goods=TRADES[trade][0], tool=TRADES[trade][1], small=random_.choice(SMALL))
    cast.update(he_or=random_.choice(["he or she", "the finder"]), she_or_he=cast["he"])
    cast["a_old"] = "a " + random_.choice(["miller", "farmer", "widow", "king", "ferryman", "tailor"])
    lines = []
    for paragraph in random_.choice(PLOTS)(cast, random_):
        lines.append("".join(random_.choice(sentence) for sentence in paragraph).strip())
    return "\n".join(tidy(expand(line, cast, random_)) for line in lines)


def write_tales(count: int, seed: int) -> str:
    """`count` tales, each with the end-of-text token after it."""
    random_ = random.Random(seed)
    return "".join(tale(random_) + END_OF_TEXT for _ in range(count))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tales", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="a path that ends in .xz is compressed")
    arguments = parser.parse_args()
    text = write_tales(arguments.tales, arguments.seed).encode()
    arguments.out.write_bytes(lzma.compress(text, preset=9) if arguments.out.suffix == ".xz" else text)
