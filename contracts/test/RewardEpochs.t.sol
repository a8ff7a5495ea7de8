// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {RewardDistributor} from "../src/RewardDistributor.sol";
import {IAttributionLog} from "../src/interfaces/IAttributionLog.sol";
import {IRewardDistributor} from "../src/interfaces/IRewardDistributor.sol";
import {RewardsBase} from "./Base.sol";
import {HeadsOnly} from "./Doubles.sol";
import {VM} from "./Vm.sol";

/// @dev Deposits, proposals, attestations, acceptance, veto and pause.
contract RewardEpochsTest is RewardsBase {
    bytes32 private constant ROOT = keccak256("root");
    uint256 private constant CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;

    function setUp() public {
        arrange();
    }

    function test_deposit_is_of_one_log() public {
        token.mint(payer, 7);
        VM.startPrank(payer);
        token.approve(address(rewards), 7);
        VM.expectEmit(address(rewards));
        emit IRewardDistributor.Deposited(logA, payer, 7);
        rewards.deposit(logA, 7);
        assertEq(rewards.depositOf(logA), DEPOSIT + 7);
        assertEq(rewards.depositOf(logB), DEPOSIT);
    }

    function test_deposit_for_an_unknown_log() public {
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.UnknownLog.selector, keccak256("nothing")));
        rewards.deposit(keccak256("nothing"), 1);
    }

    function test_deposit_over_128_bits() public {
        VM.expectRevert(
            abi.encodeWithSelector(
                SafeCast.SafeCastOverflowedUintDowncast.selector, 128, uint256(type(uint128).max) + 1
            )
        );
        rewards.deposit(logA, uint256(type(uint128).max) - DEPOSIT + 1);
    }

    function test_constructor_refuses_zero_parameters() public {
        IERC20 paid = IERC20(token);
        VM.expectRevert(IRewardDistributor.ZeroParameter.selector);
        new RewardDistributor(paid, log, admin, 0, CAP, 1);
        VM.expectRevert(IRewardDistributor.ZeroParameter.selector);
        new RewardDistributor(paid, log, admin, DELAY, 0, 1);
        VM.expectRevert(IRewardDistributor.ZeroParameter.selector);
        new RewardDistributor(paid, log, admin, DELAY, CAP, 0);
    }

    function test_views_say_what_was_constructed() public view {
        assertEq(address(rewards.token()), address(token));
        assertEq(address(rewards.attributionLog()), address(log));
        assertEq(rewards.delay(), DELAY);
        assertEq(rewards.epochCap(), CAP);
        assertEq(rewards.threshold(), 2);
        assertEq(rewards.defaultAdmin(), admin);
        assertEq(rewards.defaultAdminDelay(), DELAY);
    }

    function test_epoch_from_proposal_to_acceptance() public {
        IRewardDistributor.Allocation[] memory allocations =
            both(allocation(logA, 0, 60, 400), allocation(logB, 0, 100, 600));
        VM.expectEmit(address(rewards));
        emit IRewardDistributor.Proposed(1, ROOT, 1000, allocations);
        propose(ROOT, 1000, allocations);
        (bytes32 hash, uint64 validAt) = rewards.pending();
        assertEq(hash, rewards.attestationDigest(1, ROOT, 1000, allocations));
        assertEq(validAt, block.timestamp + DELAY);
        skip(DELAY);

        bytes[] memory signatures = attestations(2);
        VM.expectEmit(address(rewards));
        emit IRewardDistributor.Settled(logA, 0, 60, 400);
        VM.expectEmit(address(rewards));
        emit IRewardDistributor.Settled(logB, 0, 100, 600);
        VM.expectEmit(address(rewards));
        emit IRewardDistributor.Accepted(1, ROOT, 1000);
        rewards.accept(1, ROOT, 1000, allocations, signatures);

        assertEq(rewards.epoch(), 1);
        assertEq(rewards.root(), ROOT);
        assertEq(rewards.settledSizeOf(logA), 60);
        assertEq(rewards.settledSizeOf(logB), 100);
        assertEq(rewards.depositOf(logA), DEPOSIT - 400);
        assertEq(rewards.depositOf(logB), DEPOSIT - 600);
        (uint256 total, uint256 claimed, bool paused) = rewards.totals();
        assertTrue(total == 1000 && claimed == 0 && !paused);
        (hash, validAt) = rewards.pending();
        assertTrue(hash == bytes32(0) && validAt == 0);
    }

    function test_epoch_without_allocations_only_replaces_the_root() public {
        settle(ROOT, only(logA, 0, 10, 100));
        settle(keccak256("repaired"), new IRewardDistributor.Allocation[](0));
        assertEq(rewards.root(), keccak256("repaired"));
    }

    function test_propose_by_others() public {
        address[4] memory others = [admin, guardian, attestor(0), person("stranger")];
        bytes32 role = rewards.PUBLISHER_ROLE();
        for (uint256 i = 0; i < others.length; ++i) {
            VM.expectRevert(
                abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, others[i], role)
            );
            VM.prank(others[i]);
            rewards.propose(ROOT, 1, only(logA, 0, 1, 1));
        }
    }

    function test_propose_while_one_is_pending() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.EpochPending.selector, 1));
        propose(ROOT, 1, only(logA, 0, 1, 1));
        skip(DELAY * 10); // not even a stale one
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.EpochPending.selector, 1));
        propose(ROOT, 1, only(logA, 0, 1, 1));
    }

    function test_allocations_unordered_or_duplicate() public {
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.AllocationsNotAscending.selector, logB, logA));
        propose(ROOT, 2, both(allocation(logB, 0, 1, 1), allocation(logA, 0, 1, 1)));
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.AllocationsNotAscending.selector, logA, logA));
        propose(ROOT, 2, both(allocation(logA, 0, 1, 1), allocation(logA, 0, 1, 1)));
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.AllocationsNotAscending.selector, logA, logA));
        propose(ROOT, 2, both(allocation(logA, 0, 1, 1), allocation(logA, 1, 2, 1)));
    }

    function test_33_allocations() public {
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.TooManyAllocations.selector, 33));
        propose(ROOT, 0, new IRewardDistributor.Allocation[](33));
    }

    function test_32_allocations() public {
        bytes32[] memory logIds = new bytes32[](32);
        for (uint256 i = 0; i < 32; ++i) {
            bytes32 logId = register(log, VM.toString(i));
            fund(logId, 10);
            anchor(log, logId, 5);
            uint256 place = i;
            for (; place > 0 && logIds[place - 1] > logId; --place) {
                logIds[place] = logIds[place - 1];
            }
            logIds[place] = logId;
        }
        IRewardDistributor.Allocation[] memory allocations = new IRewardDistributor.Allocation[](32);
        for (uint256 i = 0; i < 32; ++i) {
            allocations[i] = allocation(logIds[i], 0, 5, 10);
        }
        settle(ROOT, allocations);
        for (uint256 i = 0; i < 32; ++i) {
            assertTrue(rewards.depositOf(logIds[i]) == 0 && rewards.settledSizeOf(logIds[i]) == 5);
        }
    }

    function test_allocation_that_skips_repeats_or_is_empty() public {
        settle(ROOT, only(logA, 0, 10, 100));
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.WrongStart.selector, logA, 11, 10));
        propose(ROOT, 101, only(logA, 11, 12, 1));
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.WrongStart.selector, logA, 0, 10));
        propose(ROOT, 101, only(logA, 0, 12, 1));
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.EmptyRange.selector, logA, 10, 10));
        propose(ROOT, 101, only(logA, 10, 10, 1));
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.EmptyRange.selector, logA, 10, 9));
        propose(ROOT, 101, only(logA, 10, 9, 1));
    }

    function test_allocation_over_the_anchored_size() public {
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.NotAnchored.selector, logA, 101, 100));
        propose(ROOT, 1, only(logA, 0, 101, 1));
        bytes32 unknown = keccak256("nothing");
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.NotAnchored.selector, unknown, 1, 0));
        propose(ROOT, 0, only(unknown, 0, 1, 0));
    }

    function test_total_other_than_the_sum() public {
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.WrongTotal.selector, 11, 10));
        propose(ROOT, 11, only(logA, 0, 1, 10));
        settle(ROOT, only(logA, 0, 1, 10));
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.WrongTotal.selector, 9, 10));
        propose(ROOT, 9, new IRewardDistributor.Allocation[](0));
    }

    function test_amounts_that_overflow_when_added() public {
        uint256 most = type(uint256).max;
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.InsufficientDeposit.selector, logA, most, DEPOSIT));
        propose(ROOT, 0, both(allocation(logA, 0, 1, most), allocation(logB, 0, 1, 1)));
    }

    /// @dev The dearest receipts: 10^30 per million tokens, 2^32 - 1 tokens each way. Beyond 120 bits of total: refused.
    function test_the_dearest_receipts_until_the_total_is_full() public {
        uint256 price = 2 * (uint256(type(uint32).max) * 10 ** 30 / 10 ** 6);
        uint256 count = type(uint120).max / price;
        rewards = new RewardDistributor(IERC20(token), log, admin, DELAY, type(uint128).max, 1);
        VM.startPrank(admin);
        rewards.grantRole(rewards.PUBLISHER_ROLE(), publisher);
        rewards.grantRole(rewards.ATTESTOR_ROLE(), attestor(0));
        rewards.grantRole(rewards.ATTESTOR_ROLE(), attestor(1));
        VM.stopPrank();
        fund(logA, price * (count + 1));
        settle(ROOT, only(logA, 0, 1, price * count));
        uint256 over = price * (count + 1);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.TotalTooLarge.selector, over, type(uint120).max));
        propose(ROOT, over, only(logA, 1, 2, price));
    }

    function test_accept_before_the_delay() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        bytes[] memory signatures = attestations(2);
        uint64 validAt = uint64(block.timestamp) + DELAY;
        skip(DELAY - 1);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.TooEarly.selector, validAt));
        rewards.accept(1, ROOT, 1, only(logA, 0, 1, 1), signatures);
        skip(1);
        rewards.accept(1, ROOT, 1, only(logA, 0, 1, 1), signatures);
    }

    function test_accept_of_what_was_not_proposed() public {
        VM.expectRevert(IRewardDistributor.NoEpochPending.selector);
        rewards.accept(0, bytes32(0), 0, new IRewardDistributor.Allocation[](0), new bytes[](0));
        propose(ROOT, 5, only(logA, 0, 1, 5));
        skip(DELAY);
        bytes[] memory signatures = attestations(2);
        expectNotProposed(2, ROOT, 5, only(logA, 0, 1, 5), signatures);
        expectNotProposed(1, keccak256("other"), 5, only(logA, 0, 1, 5), signatures);
        expectNotProposed(1, ROOT, 6, only(logA, 0, 1, 5), signatures);
        expectNotProposed(1, ROOT, 5, only(logA, 0, 1, 6), signatures);
        expectNotProposed(1, ROOT, 5, only(logA, 0, 2, 5), signatures);
        expectNotProposed(1, ROOT, 5, only(logB, 0, 1, 5), signatures);
        expectNotProposed(1, ROOT, 5, new IRewardDistributor.Allocation[](0), signatures);
        rewards.accept(1, ROOT, 5, only(logA, 0, 1, 5), signatures);
        VM.expectRevert(IRewardDistributor.NoEpochPending.selector);
        rewards.accept(1, ROOT, 5, only(logA, 0, 1, 5), signatures);
    }

    function test_accept_without_enough_attestations() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        skip(DELAY);
        for (uint256 count = 0; count < 2; ++count) {
            bytes[] memory signatures = attestations(count);
            VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.TooFewSignatures.selector, count, 2));
            rewards.accept(1, ROOT, 1, only(logA, 0, 1, 1), signatures);
        }
        bytes[] memory all = attestations(3); // more than needed are fine
        rewards.accept(1, ROOT, 1, only(logA, 0, 1, 1), all);
    }

    function test_duplicate_or_unordered_signers() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        skip(DELAY);
        bytes[] memory signatures = attestations(2);
        (bytes memory one, bytes memory other) = (signatures[0], signatures[1]);
        (signatures[0], signatures[1]) = (one, one);
        expectAcceptFails(
            signatures,
            abi.encodeWithSelector(IRewardDistributor.SignersNotAscending.selector, attestor(0), attestor(0))
        );
        (signatures[0], signatures[1]) = (other, one);
        expectAcceptFails(
            signatures,
            abi.encodeWithSelector(IRewardDistributor.SignersNotAscending.selector, attestor(1), attestor(0))
        );
    }

    function test_malformed_signatures() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        skip(DELAY);
        (bytes32 digest,) = rewards.pending();
        (uint8 v, bytes32 r, bytes32 s) = VM.sign(attestorKey(1), digest);
        bytes32 higher = bytes32(CURVE_ORDER - uint256(s));
        bytes[7] memory malformed = [
            abi.encodePacked(r, higher, v == 27 ? uint8(28) : uint8(27)), // the other signature of the same key
            abi.encodePacked(r, s, v - 27),
            abi.encodePacked(r, s, uint8(29)), // recovers zero
            abi.encodePacked(bytes32(0), s, v), // recovers zero
            abi.encodePacked(r, bytes32(uint256(s) | (uint256(v - 27) << 255))), // 64 bytes, ERC-2098
            abi.encodePacked(r, s, v, uint8(0)),
            bytes("")
        ];
        for (uint256 i = 0; i < malformed.length; ++i) {
            bytes[] memory signatures = attestations(2);
            signatures[1] = malformed[i];
            expectAcceptFails(signatures, abi.encodeWithSelector(IRewardDistributor.InvalidSignature.selector, 1));
        }
    }

    function test_attestation_for_another_chain_or_contract() public {
        RewardDistributor other = newDistributor(IERC20(token), log, 2);
        propose(ROOT, 1, only(logA, 0, 1, 1));
        skip(DELAY);
        bytes32 elsewhere = other.attestationDigest(1, ROOT, 1, only(logA, 0, 1, 1));
        (bytes32 here,) = rewards.pending();
        assertTrue(elsewhere != here);
        VM.chainId(block.chainid + 1);
        assertTrue(rewards.attestationDigest(1, ROOT, 1, only(logA, 0, 1, 1)) != here);
    }

    /// @dev By enough attestors, over the pending epoch, but in another domain.
    function test_attestations_of_another_domain_are_refused() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        skip(DELAY);
        (bytes32 pending,) = rewards.pending();
        assertEq(digestInDomain("OpenLoRA Rewards", "1", block.chainid, address(rewards)), pending);
        bytes32[4] memory others = [
            digestInDomain("OpenLoRA Rewards", "2", block.chainid, address(rewards)),
            digestInDomain("OpenLoRA Log", "1", block.chainid, address(rewards)),
            digestInDomain("OpenLoRA Rewards", "1", block.chainid + 1, address(rewards)),
            digestInDomain("OpenLoRA Rewards", "1", block.chainid, address(log))
        ];
        for (uint256 i = 0; i < others.length; ++i) {
            bytes[] memory signatures = new bytes[](2);
            signatures[0] = signed(attestorKey(0), others[i]);
            signatures[1] = signed(attestorKey(1), others[i]);
            address nobody = recovered(pending, signatures[0]);
            expectAcceptFails(signatures, abi.encodeWithSelector(IRewardDistributor.NotAttestor.selector, nobody));
        }
        rewards.accept(1, ROOT, 1, only(logA, 0, 1, 1), attestations(2));
    }

    function test_attestor_taken_from_its_role() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        bytes[] memory signatures = attestations(2);
        bytes32 role = rewards.ATTESTOR_ROLE();
        VM.prank(admin);
        rewards.revokeRole(role, attestor(1));
        skip(DELAY);
        expectAcceptFails(signatures, abi.encodeWithSelector(IRewardDistributor.NotAttestor.selector, attestor(1)));
    }

    function test_veto_until_accepted_and_even_when_ripe() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        bytes[] memory signatures = attestations(2);
        skip(DELAY * 2);
        VM.expectEmit(address(rewards));
        emit IRewardDistributor.Vetoed(1);
        VM.prank(guardian);
        rewards.veto();
        expectAcceptFails(signatures, abi.encodeWithSelector(IRewardDistributor.NoEpochPending.selector));
        VM.prank(guardian);
        VM.expectRevert(IRewardDistributor.NoEpochPending.selector);
        rewards.veto();
    }

    function test_attestations_of_a_vetoed_epoch_are_worth_nothing() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        bytes[] memory signatures = attestations(2);
        VM.prank(guardian);
        rewards.veto();
        propose(ROOT, 1, only(logA, 0, 1, 1)); // the same again is epoch 2
        skip(DELAY);
        assertEq(rewards.epoch(), 2);
        expectAcceptFails(signatures, abi.encodeWithSelector(IRewardDistributor.NotProposed.selector, digestOf(1)));
        address signer = recovered(digestOf(2), signatures[0]);
        VM.expectRevert();
        rewards.accept(2, ROOT, 1, only(logA, 0, 1, 1), signatures);
        assertTrue(signer != attestor(0));
    }

    function test_veto_and_pause_by_others() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        address[4] memory others = [admin, publisher, attestor(0), person("stranger")];
        bytes32 role = rewards.GUARDIAN_ROLE();
        for (uint256 i = 0; i < others.length; ++i) {
            bytes memory refused =
                abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, others[i], role);
            VM.startPrank(others[i]);
            VM.expectRevert(refused);
            rewards.veto();
            VM.expectRevert(refused);
            rewards.pause();
            VM.stopPrank();
        }
        VM.prank(guardian);
        rewards.pause();
        VM.prank(guardian);
        VM.expectRevert(
            abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, guardian, bytes32(0))
        );
        rewards.unpause();
    }

    function test_pause_and_unpause_mid_flow() public {
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        propose(rootOf(700, 400), 1100, only(logA, 10, 20, 100));
        bytes[] memory signatures = attestations(2);
        skip(DELAY);
        VM.expectEmit(address(rewards));
        emit IRewardDistributor.Paused();
        VM.prank(guardian);
        rewards.pause();

        bytes memory paused = abi.encodeWithSelector(IRewardDistributor.IsPaused.selector);
        bytes32[] memory proof = proofOf(600, 400, 0);
        bytes32 next = rootOf(700, 400);
        VM.expectRevert(paused);
        rewards.accept(2, next, 1100, only(logA, 10, 20, 100), signatures);
        VM.expectRevert(paused);
        rewards.claim(alice, 600, proof);
        VM.expectRevert(paused);
        propose(next, 1100, only(logA, 10, 20, 100));
        VM.prank(guardian);
        VM.expectRevert(paused);
        rewards.pause();
        fund(logA, 1); // deposits are not stopped

        VM.expectEmit(address(rewards));
        emit IRewardDistributor.Unpaused();
        VM.prank(admin);
        rewards.unpause();
        VM.prank(admin);
        VM.expectRevert(IRewardDistributor.IsNotPaused.selector);
        rewards.unpause();
        rewards.claim(alice, 600, proof);
        rewards.accept(2, next, 1100, only(logA, 10, 20, 100), signatures);
        rewards.claim(alice, 700, proofOf(700, 400, 0));
        assertEq(token.balanceOf(alice), 700);
    }

    function test_veto_while_paused() public {
        propose(ROOT, 1, only(logA, 0, 1, 1));
        VM.prank(guardian);
        rewards.pause();
        VM.prank(guardian);
        rewards.veto();
        VM.prank(admin);
        rewards.unpause();
        propose(ROOT, 1, only(logA, 0, 1, 1));
        assertEq(rewards.epoch(), 2);
    }

    /// @dev A re-org that takes an anchor back between proposal and acceptance, played by a log whose head can shrink.
    function test_accept_rechecks_the_head() public {
        HeadsOnly heads = new HeadsOnly();
        heads.set(logA, 50);
        rewards = newDistributor(IERC20(token), IAttributionLog(address(heads)), 2);
        fund(logA, 100);
        propose(ROOT, 100, only(logA, 0, 50, 100));
        bytes[] memory signatures = attestations(2);
        skip(DELAY);
        heads.set(logA, 49);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.NotAnchored.selector, logA, 50, 49));
        rewards.accept(1, ROOT, 100, only(logA, 0, 50, 100), signatures);
        heads.set(logA, 51);
        rewards.accept(1, ROOT, 100, only(logA, 0, 50, 100), signatures);
    }

    function testFuzz_epoch_moves_exactly_its_amounts(uint128 amountA, uint128 amountB, uint64 toA, uint64 toB) public {
        amountA = uint128(bound(amountA, CAP * 2));
        amountB = uint128(bound(amountB, CAP * 2));
        toA = uint64(bound(toA, 120));
        toB = uint64(bound(toB, 120));
        bool allowed = toA > 0 && toA <= 100 && toB > 0 && toB <= 100 && amountA + amountB <= CAP;
        VM.prank(publisher);
        try rewards.propose(
            ROOT, uint256(amountA) + amountB, both(allocation(logA, 0, toA, amountA), allocation(logB, 0, toB, amountB))
        ) {
            assertTrue(allowed);
        } catch {
            assertTrue(!allowed);
        }
    }

    function expectNotProposed(
        uint256 epoch,
        bytes32 root,
        uint256 total,
        IRewardDistributor.Allocation[] memory allocations,
        bytes[] memory signatures
    ) private {
        bytes32 digest = rewards.attestationDigest(epoch, root, total, allocations);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.NotProposed.selector, digest));
        rewards.accept(epoch, root, total, allocations, signatures);
    }

    function expectAcceptFails(bytes[] memory signatures, bytes memory reason) private {
        VM.expectRevert(reason);
        rewards.accept(1, ROOT, 1, only(logA, 0, 1, 1), signatures);
    }

    function digestOf(uint256 epoch) private view returns (bytes32) {
        return rewards.attestationDigest(epoch, ROOT, 1, only(logA, 0, 1, 1));
    }

    /// @dev Of the epoch that these tests propose.
    function digestInDomain(string memory name, string memory version, uint256 chainId, address verifier)
        private
        view
        returns (bytes32)
    {
        bytes32 typeHash =
            keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
        bytes32 domain =
            keccak256(abi.encode(typeHash, keccak256(bytes(name)), keccak256(bytes(version)), chainId, verifier));
        bytes memory allocationType = "Allocation(bytes32 logId,uint64 from,uint64 to,uint256 amount)";
        bytes32 allocationHash = keccak256(abi.encode(keccak256(allocationType), logA, 0, 1, 1));
        bytes memory attestationType = abi.encodePacked(
            "Attestation(uint256 epoch,bytes32 root,uint256 total,Allocation[] allocations)", allocationType
        );
        bytes32 allocationsHash = keccak256(abi.encodePacked(allocationHash));
        bytes32 structHash = keccak256(abi.encode(keccak256(attestationType), 1, ROOT, 1, allocationsHash));
        return keccak256(abi.encodePacked(hex"1901", domain, structHash));
    }

    function recovered(bytes32 digest, bytes memory signature) private pure returns (address) {
        bytes32 r;
        bytes32 s;
        assembly {
            r := mload(add(signature, 32))
            s := mload(add(signature, 64))
        }
        return ecrecover(digest, uint8(signature[64]), r, s);
    }
}
